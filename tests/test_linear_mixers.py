"""Gated DeltaNet and Mamba-2: against the papers' recurrences, in any split of a text, and with
everything that a run, a checkpoint and an export do with a model whose memory is a state.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DIMS, context_of, distance, stream, tiny, tokens
from lswt_eager import Eager
from lswt_gated_delta_net import GatedDeltaNet
from lswt_mamba2 import Mamba2
from lswt_nope import NoPosition
from lswt_qk_norm import NoNorm
from runs import assert_resumes_to_the_bit, final, inside, write_recipe
from torch import Tensor
from torch.nn.functional import conv1d, pad, silu, softplus

from lswt_core.budget import budget
from lswt_core.budget.flops import flop_counter
from lswt_core.decode.engine import InferenceEngine
from lswt_core.device import Precision
from lswt_core.distributed.world import World
from lswt_core.errors import Incompatible
from lswt_core.interfaces import MixerParts
from lswt_core.model.build import build_model
from lswt_core.model.initialise import initialise
from lswt_core.plugin_api.pytree import tree_leaves
from lswt_core.recipe import Recipe
from lswt_core.recipe.swap_syntax import overrides_of
from lswt_core.registry import Registry

PARTS = MixerParts({}, Eager, NoNorm, NoPosition)
SMALL_MAMBA = partial(Mamba2, d_state=6)
MIXERS = {"gated-delta-net": GatedDeltaNet, "mamba2": SMALL_MAMBA}
every_mixer = pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
RECIPES = Path(__file__).parents[1] / "recipes"


def layer_of(mixer: Callable[..., Any], **options: Any) -> Any:
    layer = mixer(DIMS, PARTS, **options).double()
    initialise(layer, seed=0, std=0.4)
    return layer


def outputs(layer: Any, x: Tensor) -> Tensor:
    return layer(x, None, context_of(x.shape[1], NoPosition(DIMS))).x


def inputs(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, length, DIMS.d_model, dtype=torch.float64, generator=generator)


def convolve(layer: Any, x: Tensor) -> Tensor:
    weight, bias = layer.convolution.weight[:, None], layer.convolution.bias
    return silu(conv1d(pad(x.mT, (weight.shape[-1] - 1, 0)), weight, bias, groups=len(weight)).mT)


@pytest.mark.parametrize("options", [{}, {"n_heads": 4, "expand_k": 0.5, "convolution": 2}])
def test_gated_delta_net_is_the_papers_recurrence(options: dict[str, Any]) -> None:
    layer, x = layer_of(GatedDeltaNet, **options), inputs(9)
    heads = layer.n_heads
    mixed = convolve(layer, torch.cat((layer.query(x), layer.key(x), layer.value(x)), -1))
    q, k, v = (t.unflatten(-1, (heads, -1)) for t in mixed.split(layer.widths, -1))
    q, k = (t / (t.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    a = torch.exp(-layer.log_rate.exp() * softplus(layer.decay(x) + layer.decay_bias))
    b, state, by_paper = layer.write(x).sigmoid(), 0, []
    for t in range(9):
        kt, at, bt = k[:, t, :, :, None], a[:, t, :, None, None], b[:, t, :, None, None]
        forget = torch.eye(kt.shape[2]) - bt * kt @ kt.mT  # the paper's I - beta k k^T
        state = at * forget @ state if t else 0
        state = state + bt * kt @ v[:, t, :, None]
        o = (state.mT @ q[:, t, :, :, None])[..., 0] / q.shape[-1] ** 0.5
        o = o * (o.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * layer.norm_weight
        by_paper.append(layer.output(o.flatten(1) * silu(layer.gate(x[:, t]))))
    assert distance(outputs(layer, x), torch.stack(by_paper, 1)) < 1e-12


def test_mamba2_is_the_papers_recurrence() -> None:
    layer, x = layer_of(SMALL_MAMBA), inputs(9)
    mixed = convolve(layer, torch.cat((layer.value(x), layer.key(x), layer.query(x)), -1))
    v, k, q = mixed.split(layer.widths, -1)
    v = v.unflatten(-1, (layer.n_heads, -1))
    step = softplus(layer.step(x) + layer.step_bias)
    state, by_paper = torch.zeros(2, layer.n_heads, 6, v.shape[-1]).double(), []
    for t in range(9):
        keep = torch.exp(-step[:, t] * layer.log_rate.exp())[..., None, None]
        state = keep * state + step[:, t, :, None, None] * (
            k[:, t, None, :, None] * v[:, t, :, None]
        )
        y = (q[:, t, None, :, None] * state).sum(2) + layer.skip[:, None] * v[:, t]
        y = y.flatten(1) * silu(layer.gate(x[:, t]))
        y = y * (y.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * layer.norm_weight
        by_paper.append(layer.output(y))
    assert distance(outputs(layer, x), torch.stack(by_paper, 1)) < 1e-12


def test_negative_eigenvalues_double_the_write() -> None:
    usual, wide = layer_of(GatedDeltaNet), layer_of(GatedDeltaNet, negative_eigenvalues=True)
    with torch.no_grad():
        wide.write.weight.zero_()
        usual.write.weight.zero_()
    x = inputs(5)
    assert distance(outputs(usual, x), outputs(wide, x)) > 1e-3


@every_mixer
def test_any_split_of_a_text_gives_the_same_states(mixer: Callable[..., Any]) -> None:
    decoder, ids = tiny(mixer=mixer), tokens(2, 13)
    whole = decoder(ids)[0]
    for size in (1, 5, 13):
        assert distance(stream(decoder, ids, size), whole) < 1e-11


@every_mixer
def test_every_document_gives_what_it_gives_alone(mixer: Callable[..., Any]) -> None:
    decoder, ids = tiny(mixer=mixer), tokens(2, 13)
    first_visible = torch.tensor([[0] * 4 + [4] * 9, [0] * 7 + [7] * 5 + [12]])
    for size in (1, 5, 13):
        hidden = stream(decoder, ids, size, first_visible)
        for row, begin, end in ((0, 0, 4), (0, 4, 13), (1, 0, 7), (1, 7, 12), (1, 12, 13)):
            alone, _ = decoder(ids[row : row + 1, begin:end])
            assert distance(hidden[row, begin:end], alone[0]) < 1e-11


@every_mixer
def test_what_was_read_is_remembered_for_good(mixer: Callable[..., Any]) -> None:
    """Over segments, without a bound, and with a gradient by the state."""
    decoder, ids = tiny(mixer=mixer), tokens(1, 40)
    changed = ids.clone()
    changed[0, 0] += 1
    assert distance(stream(decoder, ids, 4)[:, -1], stream(decoder, changed, 4)[:, -1]) > 0
    _, state = decoder(ids[:, :4])
    assert all(leaf.shape[0] == 1 and leaf.requires_grad for leaf in tree_leaves(state))
    assert decoder.is_recurrent and decoder.memory_length == 0 and decoder.can_read_on


@every_mixer
def test_autocast_changes_little_and_keeps_the_state_in_float32(
    mixer: Callable[..., Any],
) -> None:
    decoder, ids = tiny(mixer=mixer, dtype=torch.float32, std=0.1), tokens(2, 12)
    exact, _ = decoder(ids)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, state = decoder(ids[:, :6])
        later, state = decoder(ids[:, 6:], state)
    assert distance(torch.cat((rounded, later), 1).float(), exact) < 0.15
    assert {leaf.dtype for leaf in tree_leaves([s["recurrent"] for s in state])} == {torch.float32}


@every_mixer
def test_decoding_gives_what_reading_gives(mixer: Callable[..., Any]) -> None:
    decoder, ids = tiny(mixer=mixer), tokens(2, 11)
    engine = InferenceEngine(decoder, Precision.choose("float32", torch.device("cpu")), 4)
    expected = decoder(ids)[0]
    read = engine.start()
    decoded = [read(ids[:, :6]), *(read(ids[:, i : i + 1]) for i in range(6, 11))]
    assert distance(torch.cat(decoded, 1), expected) < 1e-11
    padded = torch.cat((tokens(1, 3, seed=9).expand(2, 3), ids), 1)
    read = engine.start(torch.tensor([3, 3]))
    decoded = [read(padded[:, :9])[:, 3:], *(read(padded[:, i : i + 1]) for i in range(9, 14))]
    assert distance(torch.cat(decoded, 1), expected) < 1e-11


# ---------- recipes, runs, plans

HYBRID = """
[layers.0.mixer]
use = "gated-delta-net"
[layers.1.mixer]
use = "mamba2"
d_state = 8
[layers."0-1".memory]
registers = false
xl = false
"""


def hybrid(path: Path) -> Path:
    """A recipe with two recurrent layers and an attention layer with memories."""
    path.write_text(path.read_text().replace("n_layers = 2", "n_layers = 3") + HYBRID)
    return path


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = hybrid(write_recipe(tmp_path))
    few = ("train.steps=2", "checkpoint.every=1", "evaluate.every=2", "train.document_masking=true")
    run = assert_resumes_to_the_bit(monkeypatch, recipe, *few)
    kept = [key for key in final(run) if "recurrent" in key]
    assert len(kept) == 2 and all(final(run)[key].shape[0] == 4 for key in kept)  # type: ignore[attr-defined]


def test_states_of_all_of_the_past_cannot_be_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = hybrid(write_recipe(tmp_path))
    code = inside(monkeypatch, recipe, "checkpoint.memory=replay", "--out", "run")
    assert code == Incompatible.exit_code
    output = capsys.readouterr()
    assert 'set checkpoint.memory = "exact"' in output.out + output.err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_only_states_of_all_of_the_past_cannot_be_replayed() -> None:
    tables: dict[str, Any] = {"checkpoint": {"memory": "replay"}, "train": {"steps": 1}}
    tables["model"] = {"d_model": 16, "n_heads": 2, "n_layers": 2}
    recurrent = {"mixer": {"use": "mamba2"}, "memory": {}, "positional": {"use": "none"}}
    assembled(Recipe.from_dict(tables))
    with pytest.raises(Incompatible, match="mamba2"):
        assembled(Recipe.from_dict(tables | recurrent))


def assembled(recipe: Recipe) -> Any:
    return build_model(recipe, Registry(), device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.parametrize("selector", ["", 'layers."0-1".'])
@pytest.mark.parametrize("as_line", [False, True], ids=["command line", "recipe"])
def test_the_remedies_for_parts_without_use_can_be_pasted(
    tmp_path: Path, selector: str, as_line: bool
) -> None:
    """What is to be set, set as the error says it, one after the other until the model builds."""
    overrides, remedies = [f'{selector}mixer.use="gated-delta-net"'], list[str]()
    file = tmp_path / "mine.toml"
    while True:
        head = "\n".join([f'extends = "{RECIPES / "quickstart.toml"}"', *remedies])
        file.write_text(head)
        recipe = Recipe.load(file, overrides)
        try:
            built = assembled(recipe)
        except Incompatible as error:
            found = re.findall(r"(?m): set (.*)$", str(error))
            assert found and len(remedies) + len(overrides) < 6, error
            (remedies if as_line else overrides).append(found[-1])
            continue
        break
    names = [block.attention.name for block in built.loss.decoder.blocks]
    recurrent = 2 if selector else 4
    assert names == ["gated-delta-net"] * recurrent + ["attention"] * (4 - recurrent)


@pytest.mark.parametrize("selector", ["", 'layers."0-1".'])
def test_the_remedies_together_are_overrides_and_a_swap(selector: str) -> None:
    swap = f"{selector}mixer=mamba2"
    quickstart = RECIPES / "quickstart.toml"
    with pytest.raises(Incompatible) as caught:
        assembled(Recipe.load(quickstart, overrides_of(swap)))
    words, whole = (
        shlex.split(line.partition(": ")[2]) for line in str(caught.value).splitlines()[-2:]
    )
    assembled(Recipe.load(quickstart, [*overrides_of(swap), *words]))
    assert whole[0] == "--swap" and len(overrides_of(whole[1])) == 1 + len(words)
    assembled(Recipe.load(quickstart, overrides_of(whole[1])))


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_plan_counts_the_state(mixer: str) -> None:
    tables: dict[str, Any] = {
        "model": {"d_model": 32, "n_heads": 2, "n_layers": 2},
        "embedding": {"vocab_size": 61, "d_vocab": 24},
        "mixer": {"use": mixer},
        "memory": {},
        "positional": {"use": "none"},
        "train": {"steps": 1, "seq_len": 96, "precision": "bfloat16"},
    }
    recipe = Recipe.from_dict(tables)
    planned = budget(recipe, Registry(), World(device=torch.device("cpu")))
    assert planned.flops is not None and planned.flops.forward["attention projections"] > 0
    state = assembled(recipe).loss.decoder(torch.zeros(1, 96, dtype=torch.int64, device="meta"))[1]
    assert planned.memory.parts["memories"] == sum(4 * leaf.numel() for leaf in tree_leaves(state))


def test_triangular_systems_are_counted() -> None:
    matrix, right = torch.ones(2, 5, 5, device="meta"), torch.ones(2, 5, 3, device="meta")
    with flop_counter() as counter:
        torch.linalg.solve_triangular(matrix, right, upper=False)
    assert counter.get_total_flops() == 2 * 5 * 5 * 3


def test_a_text_is_read_again_where_a_layer_keeps_nothing() -> None:
    recipe = Recipe.from_dict(
        {
            "model": {"d_model": 16, "n_heads": 2, "n_layers": 2},
            "embedding": {"vocab_size": 29, "d_vocab": 8},
            "layers": {"0": {"mixer": {"use": "gated-delta-net"}}},
            "memory": {},
            "train": {"steps": 1},
        }
    )
    decoder = assembled(recipe).loss.decoder
    assert decoder.keeps_state and not decoder.can_read_on


@pytest.mark.slow
def test_gated_delta_net_is_that_of_transformers() -> None:
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    config = qwen.Qwen3NextConfig(
        hidden_size=16,
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=6,
        linear_value_head_dim=12,
        rms_norm_eps=1e-5,
        num_hidden_layers=1,
    )
    theirs, ours = qwen.Qwen3NextGatedDeltaNet(config, 0), layer_of(GatedDeltaNet)
    by_head = [
        layer.weight.unflatten(0, (2, -1))
        for layer in (ours.query, ours.key, ours.value, ours.gate)
    ]
    theirs.load_state_dict(
        {
            "in_proj_qkvz.weight": torch.cat(by_head, 1).flatten(0, 1),
            "in_proj_ba.weight": torch.stack((ours.write.weight, ours.decay.weight), 1).flatten(
                0, 1
            ),
            "conv1d.weight": ours.convolution.weight[:, None],
            "dt_bias": ours.decay_bias,
            "A_log": ours.log_rate,
            "norm.weight": ours.norm_weight,
            "out_proj.weight": ours.output.weight,
        }
    )
    x = inputs(70)  # more than their chunk
    assert distance(theirs(x.float()).double(), outputs(ours, x)) < 1e-4


@pytest.mark.slow
def test_mamba2_is_that_of_transformers() -> None:
    mamba = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    config = mamba.Mamba2Config(
        hidden_size=16, num_heads=4, head_dim=8, state_size=6, n_groups=1, chunk_size=8
    )
    theirs, ours = mamba.Mamba2Mixer(config, 0), layer_of(SMALL_MAMBA)
    projections = (ours.gate, ours.value, ours.key, ours.query, ours.step)
    theirs.load_state_dict(
        {
            "in_proj.weight": torch.cat([layer.weight for layer in projections]),
            "conv1d.weight": ours.convolution.weight[:, None],
            "conv1d.bias": ours.convolution.bias,
            "dt_bias": ours.step_bias,
            "A_log": ours.log_rate,
            "D": ours.skip,
            "norm.weight": ours.norm_weight,
            "out_proj.weight": ours.output.weight,
        }
    )
    x = inputs(20)
    assert distance(theirs(x.float()).double(), outputs(ours, x)) < 1e-4
