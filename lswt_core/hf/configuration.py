"""Config of an exported model: the model tables of its resolved recipe, and where its components
come from.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from transformers.configuration_utils import PretrainedConfig


class LswtConfig(PretrainedConfig):
    """Everything a model is built from.

    ``recipe`` holds the tables [model], [embedding], [head], [block], [mixer], [positional],
    [memory], [attention], [qk_norm], [ffn], [norm] and [layers] with every default written out.
    ``components`` maps "kind/name" to the distribution and version that provide the component and
    the sha256 of its source. ``seq_len`` is the training sequence length (new tokens per step).
    ``memory_length`` and ``attention`` can be overridden through ``from_pretrained``.
    """

    model_type = "lswt"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]

    def __init__(
        self,
        recipe: dict[str, Any] | None = None,
        components: dict[str, dict[str, str]] | None = None,
        seq_len: int = 2048,
        **kwargs: Any,
    ) -> None:
        self.recipe = copy.deepcopy(recipe or {})
        self.components = copy.deepcopy(components or {})
        self.seq_len = seq_len
        # either the table is also the LM head, and transformers has no second matrix to tie, or
        # there are two
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        return self.recipe["embedding"]["vocab_size"]

    @vocab_size.setter
    def vocab_size(self, size: int) -> None:
        """Set by transformers' ``resize_token_embeddings``."""
        self.recipe["embedding"]["vocab_size"] = size

    def memory_tables(self) -> list[dict[str, Any]]:
        """Return the tables of all memories, those of single layers included."""
        model_tables = (self.recipe, *self.recipe.get("layers", {}).values())
        memories = [tables.get("memory", {}) for tables in model_tables]
        return [table for memory in memories for table in memory.values() if table]

    @property
    def memory_length(self) -> int:
        """Length of the longest memory in tokens; 0 if none has a length."""
        return max((table.get("length", 0) for table in self.memory_tables()), default=0)

    @memory_length.setter
    def memory_length(self, length: int) -> None:
        """Set the length of every memory that has one; raises ValueError if none has."""
        tables = [table for table in self.memory_tables() if "length" in table]
        if not tables:
            raise ValueError(f"memory_length = {length}: none of the model's memories has a length")
        for table in tables:
            table["length"] = length

    @property
    def attention(self) -> str:
        """Attention backend; "auto" chooses the best one for the device."""
        return self.recipe["attention"]["use"]

    @attention.setter
    def attention(self, name: str) -> None:
        """Use another backend in every layer, with its default options."""
        if name != self.recipe["attention"]["use"]:
            self.recipe["attention"] = {"use": name}
        for tables in self.recipe.get("layers", {}).values():
            tables.pop("attention", None)

    @property
    def hidden_size(self) -> int:
        """Model width."""
        return self.recipe["model"]["d_model"]

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers."""
        return self.recipe["model"]["n_layers"]

    @property
    def num_attention_heads(self) -> int:
        """Attention heads per layer."""
        return self.recipe["model"]["n_heads"]

    @property
    def num_key_value_heads(self) -> int:
        """Key/value heads per layer."""
        return self.recipe["model"].get("n_kv_heads", self.num_attention_heads)
