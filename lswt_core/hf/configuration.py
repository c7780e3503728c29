"""The config of an exported model: the model's part of its resolved recipe, and where its
components come from.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from transformers.configuration_utils import PretrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig


class LswtConfig(PretrainedConfig):
    """Everything a model is built from.

    ``recipe`` holds the tables [model], [embedding], [positional], [memory], [attention],
    [qk_norm], [ffn], [norm] and [layers] with every default written out; ``components`` says of
    each component ("kind/name") the distribution and version that offered it and the sha256 of its
    source; ``context`` is how many new tokens the model was trained to read at once.
    ``memory_length`` and ``attention`` may be given to ``from_pretrained`` to change those two.
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
        # one table serves both ends: there is nothing to tie
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        return self.recipe["embedding"]["vocab_size"]

    @vocab_size.setter
    def vocab_size(self, size: int) -> None:
        """Follows a table that is resized."""
        self.recipe["embedding"]["vocab_size"] = size

    def memories(self) -> list[dict[str, Any]]:
        """The tables of all memories, those of single layers included."""
        held = (self.recipe, *self.recipe.get("layers", {}).values())
        return [table for tables in held for table in tables.get("memory", {}).values() if table]

    @property
    def memory_length(self) -> int:
        """How many tokens the memories keep; 0 where none has a length."""
        return max((table.get("length", 0) for table in self.memories()), default=0)

    @memory_length.setter
    def memory_length(self, length: int) -> None:
        """The same for every memory that has a length."""
        tables = [table for table in self.memories() if "length" in table]
        if not tables:
            raise ValueError(f"memory_length = {length}: none of the model's memories has a length")
        for table in tables:
            table["length"] = length

    @property
    def attention(self) -> str:
        """The attention backend; "auto": whatever is best here."""
        return self.recipe["attention"]["use"]

    @attention.setter
    def attention(self, name: str) -> None:
        """Another backend in every layer, with its default options."""
        if name != self.recipe["attention"]["use"]:
            self.recipe["attention"] = {"use": name}
        for tables in self.recipe.get("layers", {}).values():
            tables.pop("attention", None)

    @property
    def hidden_size(self) -> int:
        """Width of the model."""
        return self.recipe["model"]["d_model"]

    @property
    def num_hidden_layers(self) -> int:
        """Number of blocks."""
        return self.recipe["model"]["n_layers"]

    @property
    def num_attention_heads(self) -> int:
        """Heads of every layer."""
        return self.recipe["model"]["n_heads"]


AutoConfig.register(LswtConfig.model_type, LswtConfig, exist_ok=True)
