"""The original authors' models rebuilt from our components, for comparisons with numbers their code
computed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from helpers import GOLDEN, build, distance, stream
from lswt_eager import Eager
from lswt_gelu import Gelu
from lswt_registers import Registers
from lswt_rope import Rope
from lswt_sdpa import Sdpa
from lswt_swiglu import SwiGlu
from lswt_xl_cache import XlCache
from safetensors.torch import load_file
from torch import Tensor

from lswt_core.hf.original_weights import convert_layout, rename_parameter
from lswt_core.interfaces import Dims
from lswt_core.model.decoder import Decoder

SEED, SMALL = GOLDEN / "lswt_seed", GOLDEN / "lswt_small"
SEED_CASES = json.loads((SEED / "manifest.json").read_text())["cases"]
SMALL_CASES = json.loads((SMALL / "manifest.json").read_text())["cases"]
WEIGHTS = load_file(SEED / "weights_base.safetensors")
BACKENDS: dict[str, Callable[[Dims], Any]] = {
    "eager": Eager,
    "split": partial(Sdpa, method="split"),
    "joint": partial(Sdpa, method="joint"),
}


def translate(name: str) -> str:
    """The original's name of a parameter in our words."""
    return rename_parameter(name).removeprefix("model.decoder.")


def dims_of(config: Mapping[str, Any]) -> Dims:
    """A configuration's sizes."""
    return Dims(
        config["d_model"],
        config["n_heads"],
        config["d_ffn"],
        config["n_layers"],
        bias=config["enable_bias"],
    )


def rebuild(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    *,
    dtype: torch.dtype = torch.float64,
    backend: str = "eager",
    length: int = 64,
    sink_frame: Any = "reference",
) -> Decoder:
    """The model of a configuration with the original's weights; ``length`` is what its memory
    keeps.
    """
    memories: dict[str, Any] = {"xl": partial(XlCache, length=length)}
    if config["n_registers"]:
        memories["registers"] = partial(Registers, count=config["n_registers"])
    decoder = build(
        dims=dims_of(config),
        positional=partial(
            Rope,
            base=float(config["rope_base_freq"]),
            reversed=config["rope_reversed"],
            sink_frame=sink_frame,
        ),
        memories=memories,
        attention=BACKENDS[backend],
        ffn=SwiGlu if config["gated_ffn"] else Gelu,
        vocab_size=config["vocab_size"],
        d_vocab=config["d_vocab"],
    )
    expected = decoder.state_dict()
    named = {translate(name): convert_layout(name, tensor) for name, tensor in weights.items()}
    decoder.to_empty(device="cpu").load_state_dict({name: named[name] for name in expected})
    return decoder.to(dtype)


def rebuilt(
    case: str,
    dtype: torch.dtype = torch.float64,
    backend: str = "eager",
    length: int = 64,
    sink_frame: Any = "reference",
) -> Decoder:
    """A case of lswt_seed."""
    return rebuild(
        SEED_CASES[case]["config"],
        WEIGHTS,
        dtype=dtype,
        backend=backend,
        length=length,
        sink_frame=sink_frame,
    )


def expected(case: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """A case's tensors, those computed in ``dtype`` under their plain names."""
    tensors = load_file(SEED / f"case_{case}.safetensors")
    doubles = {
        name.removesuffix("_f64"): tensor
        for name, tensor in tensors.items()
        if name.endswith("_f64")
    }
    return tensors | doubles if dtype == torch.float64 else tensors


def seed_errors(case: str, dtype: torch.dtype, backend: str) -> dict[str, float]:
    """How far the logits are from the original's, by how the text was cut into calls and how much
    was remembered.
    """
    golden = expected(case, dtype)
    patterns = {
        "logits_full": (24, 64),
        "logits_chunk8": (8, 64),
        "logits_step1": (1, 64),
        "logits_chunk8_trim8": (8, 8),
        "logits_chunk8_trim4": (8, 4),
    }
    actual = {}
    for name, (size, length) in patterns.items():
        decoder = rebuilt(case, dtype, backend, length)
        with torch.no_grad():
            actual[name] = distance(
                decoder.vocabulary.logits(stream(decoder, golden["input_ids"], size)), golden[name]
            )
    return actual


def small_errors(case: str, backend: str) -> dict[str, float]:
    """The same for the small cases, whose original was computed in float64 throughout."""
    golden = load_file(SMALL / "cases.safetensors")
    prefix = f"{case}/weights/"
    weights = {
        name.removeprefix(prefix): tensor
        for name, tensor in golden.items()
        if name.startswith(prefix)
    }
    errors = {}
    for name, size, length in (("logits_full", 12, 64), ("logits_chunk4_trim4", 4, 4)):
        decoder = rebuild(SMALL_CASES[case]["config"], weights, backend=backend, length=length)
        with torch.no_grad():
            errors[name] = distance(
                decoder.vocabulary.logits(stream(decoder, golden["input_ids"], size)),
                golden[f"{case}/{name}"],
            )
    return errors
