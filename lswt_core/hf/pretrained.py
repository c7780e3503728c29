"""Base class of the transformers models: initial weights, and a frozen embedding table that stays
frozen.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from lswt_core.hf.configuration import LswtConfig
from lswt_core.model.initialise import has_default_initialisation


def has_own_tensors(module: nn.Module) -> bool:
    """Return whether a module has parameters or buffers besides its children's."""
    return any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))


def reset_module(module: nn.Module, std: float) -> None:
    """Draw its ``matrix_parameters``, call ``reset_parameters``, then restore every tensor that was
    loaded from a file.
    """
    matrices = getattr(module, "matrix_parameters", ())
    tensors = (*module.parameters(), *module.buffers())
    loaded = [(t, t.clone()) for t in tensors if getattr(t, "_is_hf_initialized", False)]
    for name in matrices:
        nn.init.normal_(module.get_parameter(name), std=std)
    if not matrices or hasattr(module, "reset_parameters"):
        module.reset_parameters()  # type: ignore[operator]
    for tensor, value in loaded:  # transformers resets a module if one of its buffers is missing
        tensor.copy_(value)


class LswtPreTrainedModel(PreTrainedModel):
    """Weight initialisation and loading for both model classes."""

    config_class = LswtConfig
    base_model_prefix = "model"
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    _is_stateful = True  # assisted decoding would have to roll the memory back

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise a module's own parameters as training does
        (``lswt_core.model.initialise.initialise``), from torch's global random generator.
        """
        std = self.config.recipe["model"]["init_std"]
        if has_default_initialisation(module):
            nn.init.normal_(module.weight, std=std)  # type: ignore[arg-type]
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif has_own_tensors(module):
            reset_module(module, std)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialise all weights. transformers skips modules without tensors of their own, whose
        ``reset_parameters`` may initialise their children; it is called here.
        """
        bare = [module for module in self.modules() if not has_own_tensors(module)]
        waiting = [module for module in bare if not getattr(module, "_is_hf_initialized", False)]
        super().initialize_weights()
        for module in reversed(waiting):  # children before their parents
            if hasattr(module, "reset_parameters"):
                reset_module(module, self.config.recipe["model"]["init_std"])

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, then freeze the embedding table if the recipe freezes it."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        trainable = model.config.recipe["embedding"]["trainable"]
        model.get_input_embeddings().weight.requires_grad_(trainable)
        return loaded
