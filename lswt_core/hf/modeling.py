"""transformers model classes around the decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from lswt_core.hf.cache import LswtCache
from lswt_core.hf.components import blueprint
from lswt_core.hf.configuration import LswtConfig
from lswt_core.hf.packing import Packing, pack_batch
from lswt_core.hf.pretrained import LswtPreTrainedModel
from lswt_core.interfaces import Memory

LOSS_ARGUMENTS = ("num_items_in_batch", "ignore_index", "shift_labels")
# the output field was renamed in transformers 5.24
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def require_known_arguments(kwargs: dict[str, Any]) -> None:
    """Raise TypeError for an argument the model does not implement. transformers passes some along
    that request nothing: an output that is not wanted, causal attention, or cache positions, which
    the cache counts itself.
    """
    for name, value in kwargs.items():
        is_disabled = value is None or (name.startswith("output_") and value is False)
        is_implied = name == "cache_position" or (name == "is_causal" and value is True)
        if not (is_disabled or is_implied):
            raise TypeError(
                f"the model takes no {name}: leave it out (position_ids separate texts that share a"
                " row, attention_mask marks padding)"
            )


class LswtModel(LswtPreTrainedModel):
    """Token ids to final hidden states."""

    def __init__(self, config: LswtConfig) -> None:
        super().__init__(config)
        self.decoder = blueprint(config).build()
        # transformers has one dtype per model, also for a frozen embedding table
        self.decoder.vocabulary.table.to(torch.get_default_dtype())
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the embedding table, to which the LM head may be tied."""
        return self.decoder.vocabulary.table  # type: ignore[return-value]

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding table."""
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
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Ids [B, T] (or ``inputs_embeds`` [B, T, d_vocab], rows of the embedding table) ->
        last_hidden_state [B, T, M].

        ``attention_mask`` [B, T] or [B, T_cached + T] is 0 at padding, which may stand anywhere in
        a text that begins. ``position_ids`` [B or 1, T] count the tokens of every row and restart
        at 0 where another text begins; texts of a row do not attend to each other.
        ``past_key_values`` (also called ``cache``) is an LswtCache; with ``use_cache`` it is
        updated, or created, and returned. ``hidden_states`` are those after the input norm, after
        every block and after the output norm, each [B, T, M]: one more than in transformers' own
        models, where the last block's output is already normed.
        """
        require_known_arguments(kwargs)
        memory = self.select_cache(past_key_values if cache is None else cache, use_cache)
        embedded = self.embed(input_ids, inputs_embeds)
        packing = pack_batch(self.decoder, attention_mask, position_ids, embedded, memory)
        if packing.first_visible is not None or (memory is not None and memory.has_masked_tokens):
            self.require_row_independent_layers(
                embedded.shape[1] + (0 if memory is None else memory.length)
            )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden: list[Tensor] | None = [] if output_hidden_states else None
        last, state = self.run_decoder(input_ids, embedded, packing, memory, hidden)
        returned = None
        if memory is not None and self.returns_cache(use_cache):
            memory.advance(state, packing.text_length, *embedded.shape[:2])
            returned = memory
        out = BaseModelOutputWithPast(
            last_hidden_state=last,
            hidden_states=tuple(hidden) if hidden else None,
            **{CACHE: returned},
        )
        return out if return_dict is None or return_dict else out.to_tuple()

    def embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Return token embeddings [B, T, d_vocab]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        embedded = inputs_embeds
        if embedded is None:
            embedded = self.get_input_embeddings()(input_ids)
        width = self.config.recipe["embedding"]["d_vocab"]
        if embedded.shape[-1] != width:
            raise ValueError(
                f"inputs_embeds are rows of the embedding table, {width} wide, not"
                f" {embedded.shape[-1]}"
            )
        return embedded

    def run_decoder(
        self,
        input_ids: Tensor | None,
        embedded: Tensor,
        packing: Packing,
        memory: LswtCache | None,
        hidden: list[Tensor] | None,
    ) -> tuple[Tensor, Any]:
        """Token ids, if known, and embeddings [B, T, d_vocab] -> final states [B, T, M] and the
        layers' state; every hidden state is appended to ``hidden``.
        """

        def collect(x: Tensor) -> None:
            if hidden is not None:
                hidden.append(packing.unpack(x))

        last, state = self.decoder.trunk(
            self.decoder.vocabulary.project_in(packing.pack(embedded)),
            None if memory is None else memory.state,
            packing.first_visible,
            ids=None if input_ids is None else packing.pack(input_ids),
            visit=collect,
        )
        return packing.unpack(last), state

    def returns_cache(self, use_cache: bool | None) -> bool:
        """Return whether a call returns a cache; never if no layer keeps state."""
        if use_cache is None:
            use_cache = not self.training
        return bool(use_cache and self.decoder.keeps_state)

    def select_cache(self, given: Any, use_cache: bool | None) -> LswtCache | None:
        """Return the cache to read from: the given one, or a new one if it will be returned."""
        if given is None:
            return LswtCache() if self.returns_cache(use_cache) else None
        if not isinstance(given, LswtCache):
            raise TypeError(
                "past_key_values must be an LswtCache, as this model returns, not a"
                f" {type(given).__name__}"
            )
        if given.has_masked_tokens:
            self.require_row_independent_memories(given.length)
        return given

    def require_row_independent_memories(self, length: int) -> None:
        """Raise ValueError if a memory cannot continue rows that begin at different places."""
        for module in self.decoder.modules():
            if not isinstance(module, Memory):
                continue
            limit = module.position_dependent_from
            if limit and length >= limit:
                raise ValueError(
                    f"memory {module.name!r} cannot continue a padded or packed batch of more than"
                    f" {limit - 1} tokens: it groups tokens into blocks, counted from where the"
                    " row begins, not the text; put rows of one length together"
                )

    def require_row_independent_layers(self, length: int) -> None:
        """Raise ValueError if a layer does not compute a text of a padded or packed row as it would
        alone.
        """
        for layer in self.decoder.layers():
            limit = layer.position_dependent_from
            if limit and length >= limit:
                raise ValueError(
                    f"{layer.name!r} cannot read a padded or packed batch of more than"
                    f" {limit - 1} tokens: it groups tokens into chunks, counted from where the"
                    " row begins, not the text; put rows of one length together"
                )


class LswtForCausalLM(LswtPreTrainedModel, GenerationMixin):
    """Token ids to logits."""

    def __init__(self, config: LswtConfig) -> None:
        super().__init__(config)
        self.model = LswtModel(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the embedding table, to which the LM head may be tied."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding table."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the LM head's own linear layer; None if it has no matrix of its own for
        transformers to tie or resize.
        """
        return self.model.decoder.vocabulary.output_layer()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the LM head's own linear layer."""
        self.model.decoder.vocabulary.set_output_layer(new_embeddings)

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
        """Ids [B, T] -> logits [B, T, V], or those of the last ``logits_to_keep`` positions. The
        other arguments are those of LswtModel.

        ``labels`` [B, T] are the input ids, -100 where nothing is predicted; they are shifted here.
        ``loss`` is the mean cross-entropy of the predicted tokens in nats; ``num_items_in_batch``,
        ``ignore_index`` and ``shift_labels`` go to transformers' loss function.
        """
        loss_arguments = {name: kwargs.pop(name) for name in LOSS_ARGUMENTS if name in kwargs}
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
        states = select_positions(out.last_hidden_state, logits_to_keep)
        logits = self.model.decoder.vocabulary.logits(states)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=logits.shape[-1], **loss_arguments
            )
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=out.hidden_states, **{CACHE: out.get(CACHE)}
        )
        return output if return_dict is None or return_dict else output.to_tuple()

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any, **__: Any
    ) -> None:
        """Generate with an LswtCache; without a cache if some layer keeps no state."""
        implementation = generation_config.cache_implementation
        if implementation is not None:
            raise ValueError(
                f"cache_implementation = {implementation!r}: this model has a cache of its own"
                " memories; leave it out"
            )
        if not self.model.decoder.can_read_on:
            generation_config.use_cache = model_kwargs["use_cache"] = False
        elif generation_config.use_cache and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = LswtCache()


def select_positions(states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """States [B, T, M] at the last ``logits_to_keep`` positions (0: all), or at given indices."""
    if not isinstance(logits_to_keep, int):
        return states[:, logits_to_keep]
    if logits_to_keep == 0:
        return states
    return states[:, -logits_to_keep:]
