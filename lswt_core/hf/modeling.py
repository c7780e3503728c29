"""transformers' model classes around the decoder, whatever components it is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModel, AutoModelForCausalLM

from lswt_core.hf.cache import LswtCache
from lswt_core.hf.components import blueprint
from lswt_core.hf.configuration import LswtConfig
from lswt_core.hf.padding import Packing, text_begins
from lswt_core.interfaces import Memory, PositionalEncoding
from lswt_core.model.initialise import has_default_initialisation

LOSS_ARGUMENTS = ("num_items_in_batch", "ignore_index", "shift_labels")
# its name changed in 5.24
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def owns(module: nn.Module) -> bool:
    """Whether a module has parameters or buffers beside its children's."""
    return any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))


def restart(module: nn.Module) -> None:
    """Let a module say how it and its children start; what was loaded from a file stays."""
    tensors = (*module.parameters(), *module.buffers())
    loaded = [(t, t.clone()) for t in tensors if getattr(t, "_is_hf_initialized", False)]
    module.reset_parameters()  # type: ignore[operator]
    for tensor, value in loaded:  # a module is asked again where it has a buffer that no file holds
        tensor.copy_(value)


def require_known(more: dict[str, Any]) -> None:
    """Raise TypeError if arguments that a call has besides ours ask for something. What
    transformers itself passes along may ask for nothing: an output that is not wanted, causal
    attention, or places in its cache, which are counted here as well.
    """
    for name, value in more.items():
        unwanted = name.startswith("output_") and value is False
        known = name == "cache_position" or (name == "is_causal" and value is True)
        if not (value is None or unwanted or known):
            raise TypeError(
                f"the model takes no {name}: leave it out (texts that share a row are told by"
                " position_ids, padding by attention_mask)"
            )


def absolute(positional: PositionalEncoding) -> bool:
    """Whether an encoding depends on how long a segment is, or on where it begins."""
    return positional.length_dependent or type(positional).embed is not PositionalEncoding.embed


class LswtPreTrainedModel(PreTrainedModel):
    """What both models share: how weights start, and that a frozen table stays frozen."""

    config_class = LswtConfig
    base_model_prefix = "model"
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    _is_stateful = True  # a memory cannot be rolled back, as assisted decoding would

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Start a module's own parameters as a run does
        (``lswt_core.model.initialise.initialise``), from torch's random stream.
        """
        if has_default_initialisation(module):
            std = self.config.recipe["model"]["init_std"]
            nn.init.normal_(module.weight, std=std)  # type: ignore[arg-type]
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif owns(module):
            restart(module)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """As transformers', which passes over modules that own nothing.

        These too may say how their children start.
        """
        bare = [module for module in self.modules() if not owns(module)]
        waiting = [module for module in bare if not getattr(module, "_is_hf_initialized", False)]
        super().initialize_weights()
        for module in reversed(waiting):  # children before their parents
            if hasattr(module, "reset_parameters"):
                restart(module)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; afterwards a table that the recipe freezes is frozen again."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.get_input_embeddings().weight.requires_grad_(
            model.config.recipe["embedding"]["trainable"]
        )
        return loaded


class LswtModel(LswtPreTrainedModel):
    """Ids to normed states."""

    def __init__(self, config: LswtConfig) -> None:
        super().__init__(config)
        self.decoder = blueprint(config).build()
        vocabulary = self.decoder.vocabulary
        # transformers knows one precision a model, a frozen table's included
        vocabulary.table.to(vocabulary.input.weight.dtype)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The table, which is the output's too."""
        return self.decoder.vocabulary.table

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Exchange the table."""
        vocabulary = self.decoder.vocabulary
        vocabulary.table, vocabulary.vocab_size = value, value.num_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LswtCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: LswtCache | None = None,
        **more: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Ids [B, T] (or ``inputs_embeds`` [B, T, d_vocab], rows of the table) -> last_hidden_state
        [B, T, M].

        ``attention_mask`` [B, T] or [B, T_past + T] is 0 at padding, which may stand anywhere in a
        text that begins: a row's states are those it would have alone. ``position_ids`` [B or 1, T]
        count the tokens of every row, and begin again at 0 where another text begins, which sees
        nothing of those before it. ``past_key_values`` (also called ``cache``) is an LswtCache;
        with ``use_cache`` it is brought up to date, or begun, and returned. ``hidden_states`` are
        the input norm's, every block's and the output norm's [B, T, M], one more than in
        transformers' own models, whose last block's output is normed at once.
        """
        require_known(more)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        memory = self.memory(past_key_values if cache is None else cache, use_cache)
        embedded = (
            self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        )
        width = self.config.recipe["embedding"]["d_vocab"]
        if embedded.shape[-1] != width:
            raise ValueError(
                f"inputs_embeds are rows of the embedding table, {width} wide, not"
                f" {embedded.shape[-1]}"
            )
        valid = self.valid(attention_mask, embedded, memory)
        wanted = (
            self.config.output_hidden_states
            if output_hidden_states is None
            else output_hidden_states
        )
        states: list[Tensor] | None = [] if wanted else None
        packing = self.packing(valid, position_ids, embedded, memory)
        last, following = self.read(embedded, packing, memory, states)
        if memory is not None and self.keeps(use_cache):
            memory.advance(following, packing.own, *embedded.shape[:2])
        kept = memory if self.keeps(use_cache) else None
        out = BaseModelOutputWithPast(
            last_hidden_state=last, hidden_states=tuple(states) if states else None, **{CACHE: kept}
        )
        return out if return_dict is None or return_dict else out.to_tuple()

    def packing(
        self,
        valid: Tensor | None,
        position_ids: Tensor | None,
        embedded: Tensor,
        memory: LswtCache | None,
    ) -> Packing:
        """How new tokens are put together: valid [B, T] where there is padding, and texts as
        position_ids [B or 1, T] tell them.
        """
        packing = (
            Packing(first_visible=self.earlier(memory, embedded))
            if valid is None
            else Packing.of(valid)
        )
        if position_ids is None:
            return packing
        rows, length = embedded.shape[:2]
        if (
            position_ids.ndim != 2
            or position_ids.shape[0] not in (1, rows)
            or position_ids.shape[1] != length
        ):
            raise ValueError(
                f"position_ids must be [{rows}, {length}], not {list(position_ids.shape)}"
            )
        real = (
            torch.ones(rows, length, dtype=torch.bool, device=embedded.device)
            if valid is None
            else packing.pack(valid)
        )
        read = torch.zeros(rows, dtype=torch.int64, device=embedded.device)
        before = read if memory is None or memory.seen is None else memory.seen.to(embedded.device)
        so_far = read if memory is None else read + memory.length
        positions = packing.pack(position_ids.to(embedded.device).expand(rows, length))
        begins = text_begins(positions, real, (before, so_far))
        if begins is None:
            return packing
        self.refuse(
            "a row of several texts", lambda positional: absolute(positional) or positional.by_end
        )
        return packing.parted(begins, before)

    def read(
        self,
        embedded: Tensor,
        packing: Packing,
        memory: LswtCache | None,
        states: list[Tensor] | None,
    ) -> tuple[Tensor, Any]:
        """Embedded tokens [B, T, d_vocab] -> normed states [B, T, M] and what the memories keep;
        ``states`` takes in every hidden state on the way.
        """
        last, following = self.decoder.trunk(
            self.decoder.vocabulary.project_in(packing.pack(embedded)),
            None if memory is None else memory.state,
            packing.first_visible,
            visit=(
                (lambda x: None) if states is None else (lambda x: states.append(packing.unpack(x)))
            ),
        )
        return packing.unpack(last), following

    def keeps(self, use_cache: bool | None) -> bool:
        """Whether a call returns what the memories keep: a model whose memories keep nothing has
        none to return.
        """
        wanted = not self.training if use_cache is None else use_cache
        return bool(wanted and self.decoder.memory_length)

    def memory(self, given: Any, use_cache: bool | None) -> LswtCache | None:
        """The memory of a call: what it was given, or a new one."""
        if given is None:
            return LswtCache() if self.keeps(use_cache) else None
        if not isinstance(given, LswtCache):
            raise TypeError(
                "past_key_values must be an LswtCache, as this model returns, not a"
                f" {type(given).__name__}: what is remembered is the business of the model's own"
                " memories"
            )
        for module in self.decoder.modules() if given.padded else ():
            if (
                isinstance(module, Memory)
                and module.position_dependent_from
                and given.length >= module.position_dependent_from
            ):
                raise ValueError(
                    f"with memory {module.name!r} a padded or packed batch of more than"
                    f" {module.position_dependent_from - 1} tokens cannot go on as its rows would"
                    " alone: it keeps blocks of tokens, counted from where the text begins, for"
                    " all rows alike; pass rows of one length together"
                )
        return given

    def valid(
        self, attention_mask: Tensor | None, embedded: Tensor, memory: LswtCache | None
    ) -> Tensor | None:
        """Which new tokens are no padding [B, T]; None: all."""
        if attention_mask is None:
            return None
        rows, length = embedded.shape[:2]
        if (
            attention_mask.ndim != 2
            or attention_mask.shape[0] != rows
            or attention_mask.shape[1] < length
        ):
            raise ValueError(
                f"attention_mask must be [{rows}, {length}], or longer by the past, not"
                f" {list(attention_mask.shape)}"
            )
        valid = attention_mask[:, -length:].bool()
        if bool(valid.all()):
            return None
        if memory is not None and memory.length:
            raise ValueError(
                "padding in the middle of a text: rows whose memory holds tokens already must go on"
                " with equally many new ones; pad where the text begins, or read the rows apart"
            )
        self.refuse("a padded batch", absolute)
        return valid

    def refuse(self, what: str, hinders: Callable[[PositionalEncoding], bool]) -> None:
        """Raise ValueError if a positional encoding hinders that texts are what they would be
        alone.
        """
        for positional in self.decoder.modules():
            if isinstance(positional, PositionalEncoding) and hinders(positional):
                raise ValueError(
                    f"with positional encoding {positional.name!r} {what} would not be what its"
                    " rows are alone: it depends on the number of tokens, or on where the segment"
                    " begins or ends, for all alike; pass texts of one length together, one a row"
                )

    def earlier(self, memory: LswtCache | None, embedded: Tensor) -> Tensor | None:
        """Where what the new tokens see begins [B, T], if padding or other texts are still
        remembered; None: everything is seen.
        """
        if (
            memory is None
            or memory.seen is None
            or not memory.padded
            or int(memory.seen.min()) >= self.decoder.memory_length
        ):
            return None
        return -memory.seen.to(embedded.device)[:, None].expand(embedded.shape[:2])


class LswtForCausalLM(LswtPreTrainedModel, GenerationMixin):
    """Ids to logits, through the table that embeds them."""

    def __init__(self, config: LswtConfig) -> None:
        super().__init__(config)
        self.model = LswtModel(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The table, which is the output's too."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Exchange the table."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> None:
        """None: no layer of its own, the input's table serves; so transformers has nothing to tie
        or resize.
        """

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LswtCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: LswtCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Ids [B, T] -> logits [B, T, V], or of the last ``logits_to_keep`` places; the rest is
        LswtModel's.

        ``labels`` [B, T] are the ids again, -100 where nothing is predicted: they are shifted here.
        ``loss`` is the mean over the predicted ones in nats; ``num_items_in_batch``,
        ``ignore_index`` and ``shift_labels`` are what transformers' loss takes them for.
        """
        for_loss = {name: kwargs.pop(name) for name in LOSS_ARGUMENTS if name in kwargs}
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            cache=past_key_values if cache is None else cache,
            **kwargs,
        )
        places = (
            slice(-logits_to_keep, None)
            if isinstance(logits_to_keep, int) and logits_to_keep
            else logits_to_keep
        )
        states = (
            out.last_hidden_state if isinstance(places, int) else out.last_hidden_state[:, places]
        )
        logits = self.model.decoder.vocabulary.logits(states)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=logits.shape[-1], **for_loss
            )
        found = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=out.hidden_states, **{CACHE: out.get(CACHE)}
        )
        return found if return_dict is None or return_dict else found.to_tuple()

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any, **__: Any
    ) -> None:
        """Generate with the model's own memory, or, where it keeps nothing, by reading the whole
        text at every step.
        """
        if generation_config.cache_implementation is not None:
            asked = generation_config.cache_implementation
            raise ValueError(
                f"cache_implementation = {asked!r}: this model remembers by its own memories; leave"
                " it out"
            )
        if not self.model.decoder.memory_length:
            generation_config.use_cache = model_kwargs["use_cache"] = False
        elif generation_config.use_cache and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = LswtCache()


AutoModel.register(LswtConfig, LswtModel, exist_ok=True)
AutoModelForCausalLM.register(LswtConfig, LswtForCausalLM, exist_ok=True)
