"""What a plan says: work against the formulas of the architecture, shallow measurements against
whole ones, and what does not fit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from helpers import ROOT, slow_unless

from lswt_core.__main__ import main
from lswt_core.budget import budget, measure
from lswt_core.budget.memory import MemoryBudget, require_memory
from lswt_core.budget.speed import ACCELERATORS, tokens_per_second
from lswt_core.device import Precision
from lswt_core.distributed.world import World
from lswt_core.errors import RecipeError, ResourceError
from lswt_core.interfaces import Batch
from lswt_core.model.build import build_decoder_spec, build_model, materialise
from lswt_core.model.components import build_optimizer, build_schedule
from lswt_core.model.parameters import build_parameter_groups
from lswt_core.plugin_api.pytree import tree_leaves
from lswt_core.recipe import Recipe
from lswt_core.recipe.swap_syntax import overrides_of
from lswt_core.registry import Registry
from lswt_core.reporting.console import Console
from lswt_core.train.memory_state import capture_memory, restore_memory
from lswt_core.train.step import Step
from lswt_core.train.step_context import StepContext
from lswt_core.train.trainer import Trainer, TrainerComponents

RECIPES = ROOT / "recipes"
SIZES = ("tiny", "small", "medium", "large", "xl", "xxl")
WORLD = World()
NANO: dict[str, Any] = {
    "model": {"d_model": 16, "n_heads": 2, "n_layers": 7},
    "embedding": {"vocab_size": 64, "d_vocab": 8},
    "memory": {"registers": {"count": 3}, "xl": {"use": "xl-cache", "length": 24}},
    "loss": {"simctg": {}},
    "optimizer": {"use": "sophia-g"},
    "train": {
        "steps": 10,
        "batch_size": 8,
        "micro_batch_size": 4,
        "seq_len": 16,
        "precision": "float32",
    },
}


def recipe_of(**tables: Any) -> Recipe:
    return Recipe.from_dict({**NANO, **tables})


# ---------- work


def by_formula(
    recipe: Recipe, *, remembered: int, registers: int, frozen: bool
) -> dict[str, float]:
    """FLOPs of a token, from the shapes: 4 projections of d^2, a gated feed-forward of three d x
    d_ffn, 4 d a pair of query and key.
    """
    d, layers, new = recipe.model.d_model, recipe.model.n_layers, recipe.train.seq_len
    width, vocabulary = recipe.embedding.d_vocab, recipe.embedding.vocab_size
    d_ffn = recipe.model.d_ffn or 4 * d
    body = 2 * layers * (4 * d * d + 3 * d * d_ffn)
    around, head = 2 * 2 * width * d, 2 * width * vocabulary
    # gradients flow into these keys, and not into remembered ones
    own = 4 * d * layers * ((new + 1) / 2 + registers)
    cached = 4 * d * layers * remembered
    forward = body + around + head + own + cached
    input_gradient = 0 if frozen else 2 * width * d
    train = (
        3 * body
        + 5 * width * d * 2
        + input_gradient
        + (2 if frozen else 3) * head
        + 3 * own
        + 2 * cached
    )
    return {"forward": forward, "train": train}


@pytest.mark.parametrize("size", slow_unless(["small"], SIZES))
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_work_is_what_the_shapes_say(size: str, frozen: bool) -> None:
    overrides = ["loss.simctg=false", f"embedding.trainable={str(not frozen).lower()}"]
    recipe = Recipe.load(RECIPES / f"{size}.toml", overrides)
    actual = budget(recipe, Registry(), WORLD).flops
    expected = by_formula(recipe, remembered=2048, registers=16, frozen=frozen)
    assert sum(actual.forward.values()) == expected["forward"]
    assert actual.train == expected["train"]
    assert actual.conventional == 3 * expected["forward"]


def test_without_memory_every_key_takes_a_gradient() -> None:
    recipe = recipe_of(memory={}, loss={}, optimizer={"use": "adamw"})
    actual = budget(recipe, Registry(), WORLD).flops
    expected = by_formula(recipe, remembered=0, registers=0, frozen=False)
    assert (sum(actual.forward.values()), actual.train, actual.update_curvature) == (
        expected["forward"],
        expected["train"],
        0,
    )


@pytest.mark.slow
def test_the_curvature_is_counted_as_often_as_it_is_looked_at() -> None:
    plain = budget(recipe_of(loss={}), Registry(), WORLD).flops
    assert plain.update_curvature == round(plain.train * 16 / 10) // 16
    half = budget(
        recipe_of(
            loss={}, optimizer={"use": "sophia-g", "hessian_update_interval": 5, "fraction": 0.5}
        ),
        Registry(),
        WORLD,
    ).flops
    assert abs(half.update_curvature - plain.update_curvature) <= 1
    shared = budget(
        recipe_of(loss={}, optimizer={"use": "sophia-g", "shared_forward": True}), Registry(), WORLD
    )
    recipe, logits = (
        shared.memory.recipe,
        2 * recipe_of(loss={}).embedding.d_vocab * recipe_of(loss={}).embedding.vocab_size,
    )
    assert recipe.embedding.trainable
    # the forward pass, and the gradients of logits and table
    ahead = sum(shared.flops.forward.values()) + 2 * logits
    assert abs(shared.flops.update_curvature - (plain.train - ahead) // 10) <= 1
    assert (
        shared.memory.parts["gradients"]
        == 2 * budget(recipe_of(loss={}), Registry(), WORLD).memory.parts["gradients"]
    )
    probed = budget(
        recipe_of(loss={}, optimizer={"use": "sophia-h"}, attention={"use": "eager"}),
        Registry(),
        WORLD,
    ).flops
    assert abs(probed.update_curvature - 2 * plain.update_curvature) <= 1


def test_an_auxiliary_loss_is_counted() -> None:
    with_loss, without = (
        budget(recipe_of(loss=loss), Registry(), WORLD).flops for loss in ({"simctg": {}}, {})
    )
    rows = 16 * 16  # of cosines between states, each 2 d forward, and 4 d backward
    assert with_loss.train - without.train == 6 * 16 * rows // 16


# ---------- shallow models and whole ones

LAYERED = {
    "layers": {
        "0-1": {"ffn": {"use": "gelu"}},
        "6": {"memory": {"xl": False}, "norm": {"use": "rmsnorm"}},
    }
}


RESIDUAL = {"mixer": {"use": "value-residual"}}  # the first layer is another
CROSS_LAYER = {
    "mixer": {"use": "cross-layer-attention"},
    "layers": {"every 2 from 1": {"mixer": {"keys": "below"}, "memory": {"xl": False}}},
}


@pytest.mark.parametrize(
    "tables",
    [
        {},
        pytest.param(LAYERED, marks=pytest.mark.slow),
        pytest.param({"optimizer": {"use": "muon"}}, marks=pytest.mark.slow),
        pytest.param(RESIDUAL, marks=pytest.mark.slow),
        pytest.param(CROSS_LAYER, marks=pytest.mark.slow),
    ],
    ids=["alike", "layered", "muon", "residual", "cross-layer"],
)
def test_shallow_models_tell_what_the_whole_needs(tables: dict[str, Any]) -> None:
    recipe, registry = recipe_of(**tables), Registry()
    precision = Precision.choose("float32", WORLD.device)
    blueprint = build_decoder_spec(recipe, registry, device=WORLD.device, dtype=precision.dtype)
    whole = measure(blueprint, recipe, registry, precision, {})
    measured = budget(recipe, registry, WORLD)
    assert measured.parameters == {
        name.removeprefix("parameters: "): n
        for name, n in whole.items()
        if name.startswith("parameters: ")
    }
    assert measured.flops.train == whole["train"] // 16
    assert measured.memory.parts == {
        name.removeprefix("bytes: "): n for name, n in whole.items() if name.startswith("bytes: ")
    }


def test_weights_and_gradients_are_those_of_the_model() -> None:
    recipe = recipe_of(embedding={**NANO["embedding"], "trainable": False})
    measured = budget(recipe, Registry(), WORLD)
    loss = build_model(recipe, Registry(), device=WORLD.device, dtype=torch.float32).loss
    assert measured.memory.parts["weights"] == sum(p.nbytes for p in loss.parameters())
    assert measured.memory.parts["gradients"] == sum(
        p.nbytes for p in loss.parameters() if p.requires_grad
    )
    assert measured.total == sum(p.numel() for p in loss.parameters())
    assert measured.trainable["embedding"] == 0


def test_memories_are_keys_and_values_of_what_is_kept() -> None:
    measured = budget(recipe_of(), Registry(), WORLD).memory
    kept = 7 * 2 * 24 * 16 * 4  # layers, keys and values, tokens, width, bytes
    assert measured.parts["memories"] == kept
    assert measured.of_process(WORLD)["memories"] == 8 * 2 * kept, "of this step and the next"
    assert measured.of_process(WORLD._replace(size=2))["memories"] == 4 * 2 * kept, (
        "processes share the rows"
    )


KEEPERS: dict[str, dict[str, Any]] = {
    "xl-cache": {"use": "xl-cache", "length": 16},
    "longer": {"use": "xl-cache", "length": 24},
    "xl-hidden": {"use": "xl-hidden", "length": 12},
    "compressed": {"use": "compressed", "length": 4, "slots": 6, "rate": 4},
}


def storages(state: Any) -> dict[int, int]:
    """Bytes of what tensors lie in, by address."""
    return {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tree_leaves(state)
    }


@pytest.mark.parametrize("keeper", KEEPERS)
def test_memories_take_what_the_plan_says_also_once_restored(keeper: str) -> None:
    recipe, registry = (
        recipe_of(model={**NANO["model"], "n_layers": 1}, memory={"xl": KEEPERS[keeper]}),
        Registry(),
    )
    precision = Precision.choose("float32", WORLD.device)
    loss = build_model(recipe, registry, device=WORLD.device, dtype=torch.float32).loss
    materialise(loss, recipe, WORLD.device)
    context = StepContext(loss, WORLD, precision, seed=1, rows=range(8), micro_batch_size=4)
    ids, memory = (
        torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(0)),
        [None, None],
    )
    for number in range(3):
        step = Step(context, Batch(ids, ids), memory, number)
        step.backward("data")
        memory = step.next_memory
    planned = budget(recipe, registry, WORLD).memory.of_process(WORLD)["memories"]
    assert 2 * sum(storages(memory).values()) == planned
    trainer = Trainer(
        TrainerComponents(
            recipe.train,
            context,
            build_optimizer(recipe, registry, loss),
            build_schedule(recipe, registry),
            MagicMock(),
            MagicMock(),
            Console(silent=True),
        )
    )
    trainer.memory = memory
    restore_memory(trainer, "exact", *capture_memory(trainer, "exact"))
    assert 2 * sum(storages(trainer.memory).values()) == planned
    for actual, expected in zip(tree_leaves(trainer.memory), tree_leaves(memory), strict=True):
        assert actual.equal(expected) and actual.stride() == expected.stride()


# ---------- what does not fit


@pytest.mark.parametrize(("room", "largest"), [(8.0, 8), (4.5, 4), (2.0, 2), (1.5, 1), (0.5, 0)])
def test_the_largest_micro_batch_that_fits(room: float, largest: int) -> None:
    memory = budget(recipe_of(), Registry(), WORLD).memory
    one, two = (memory.of_process(WORLD, rows)["total"] for rows in (1, 2))
    available = int(one + (room - 1) * (two - one))
    assert memory.largest_micro(WORLD, available) == largest
    if largest:
        assert memory.of_process(WORLD, largest)["total"] <= available


@pytest.mark.parametrize(
    ("scoring", "alone", "together"),
    [({"chunk": 4}, 4, 4), ({"chunk": 64}, 16, 64), ({"use": "dense"}, 16, 128)],
    ids=str,
)
def test_logits_are_those_that_exist_at_once(
    scoring: dict[str, Any], alone: int, together: int
) -> None:
    memory = budget(recipe_of(cross_entropy=scoring), Registry(), WORLD).memory
    vocabulary, copies = 64, 4 + 2 * 4  # bytes: the logits, and two float32 copies
    assert memory.of_process(WORLD, 1)["logits"] == alone * vocabulary * copies
    assert memory.of_process(WORLD, 8)["logits"] == together * vocabulary * copies


@pytest.mark.parametrize(("kind", "chunk"), [(None, 1024), ("cpu", 1024), ("cuda", 4096)])
def test_logits_are_those_of_the_device_that_is_planned(kind: str | None, chunk: int) -> None:
    memory = budget(recipe_of(), Registry(), WORLD, device_type=kind).memory
    vocabulary, copies = 64, 4 + 2 * 4  # bytes: the logits, and two float32 copies
    assert memory.of_process(WORLD, 512)["logits"] == chunk * vocabulary * copies
    assert memory.has_host == (kind == "cuda")


def test_blocks_that_are_run_again_keep_their_inputs_and_what_one_of_them_keeps() -> None:
    train = {**NANO["train"], "activation_checkpointing": "block"}
    plain, again = (
        budget(recipe, Registry(), WORLD).memory.of_process(WORLD, 1)
        for recipe in (recipe_of(), recipe_of(train=train))
    )
    assert again["activations"] == 7 * 16 * 16 * 4 + plain["activations"] // 7
    assert {
        key: value
        for key, value in plain.items()
        if key not in ("activations", "total", "available")
    } == {
        key: value
        for key, value in again.items()
        if key not in ("activations", "total", "available")
    }


@pytest.mark.slow
def test_blocks_that_are_run_again_keep_every_residual_stream() -> None:
    train = {**NANO["train"], "activation_checkpointing": "block"}
    block = {"use": "hyper-connections", "streams": 3}
    plain, again = (
        budget(recipe, Registry(), WORLD).memory.of_process(WORLD, 1)["activations"]
        for recipe in (recipe_of(block=block), recipe_of(block=block, train=train))
    )
    assert again == 7 * 16 * (3 * 16) * 4 + plain // 7


@pytest.mark.slow
def test_the_xl_model_fits_one_gpu_of_141_gb_if_its_moments_are_short() -> None:
    memory = ACCELERATORS["h200"].memory
    few_rows = [
        "train.batch_size=4",
        "train.micro_batch_size=1",
        "train.precision=bfloat16",
        "train.activation_checkpointing=block",
    ]

    def needed(*more: str) -> int:
        recipe = Recipe.load(RECIPES / "xl.toml", [*few_rows, *more])
        return budget(recipe, Registry(), WORLD).memory.of_process(WORLD)["total"]

    assert needed("optimizer.moments=bfloat16") < memory < needed()


@pytest.mark.parametrize(
    ("largest", "advice"),
    [(4, "train.micro_batch_size=4"), (0, "one sequence")],
)
def test_a_run_that_does_not_fit_is_refused_with_what_would(largest: int, advice: str) -> None:
    parts = {"weights": 10**12, "memories": 0, "activations": 10**9}
    measured = MemoryBudget(parts, recipe_of(), lambda tokens: 0, 32).of_process(WORLD)
    with pytest.raises(ResourceError, match=advice) as caught:
        require_memory(measured, torch.device("cpu"), "nano", largest)
    assert "1,000.00 GB" in str(caught.value)


# ---------- the command


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "nano.toml"
    path.write_text(recipe_of().dump())
    return path


def run(*words: object) -> int:
    return main(["plan", *map(str, words)])


def test_the_command_prints_a_plan_and_what_swaps_change(
    written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(written, "--swap", "ffn=gelu") == 0
    text = capsys.readouterr().out
    for word in (
        "parameters",
        "memory of one process, 4 rows at a time",
        "forward: attention scores",
        "curvature",
        "tokens/s",
        "ffn=gelu",
    ):
        assert word in text
    assert "a few micro-batches run just now" in text


def test_json_has_the_numbers(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run(written, "--json", "--ranks", 2, "--micro", 2, "--on", "h100", "--swap", "ffn=gelu")
        == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert report["run"] == {
        "steps": 10,
        "tokens_per_step": 128,
        "tokens": 1280,
        "micro_batch_size": 2,
        "ranks": 2,
    }
    assert report["attention"]["backend"] == "auto"  # what that is there, only the device tells
    assert report["precision"] == "bfloat16"
    assert report["device"] == "h100"
    assert report["memory"]["available"] == 80 * 2**30
    assert (
        report["time"]["source"].startswith("NVIDIA") and report["time"]["assumed_efficiency"] < 1
    )
    assert report["swaps"]["ffn=gelu"]["parameters"]["total"] < report["parameters"]["total"]
    assert report["memory"]["largest_micro"] == 4, "a process has half the rows"


def test_the_largest_model_says_what_would_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run(RECIPES / "medium.toml", "--on", "a100-40gb", "train.batch_size=24", "--micro", 24) == 0
    )
    assert "does not fit: micro-batch <= " in capsys.readouterr().out


def test_an_unknown_accelerator_is_refused(
    written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(written, "--on", "h10") == 2
    assert "h100" in capsys.readouterr().err


@pytest.mark.parametrize("change", [("flops_per_token", 2), ("parameters", 2)])
def test_more_work_takes_longer(change: tuple[str, int]) -> None:
    given = {"flops_per_token": 10**9, "parameters": 10**8}
    machine, recipe = ACCELERATORS["h100"], recipe_of()
    name, factor = change
    assert tokens_per_second(
        recipe, **(given | {name: given[name] * factor}), machine=machine
    ) < tokens_per_second(recipe, **given, machine=machine)


# ---------- swaps


@pytest.mark.parametrize(
    ("swap", "override"),
    [
        ("ffn=gelu", "ffn.use=gelu"),
        ("ffn.use=gelu", "ffn.use=gelu"),
        ("positional.base=10000", "positional.base=10000"),
        ("memory.xl=false", "memory.xl=false"),
        ("memory.registers=true", "memory.registers.use=registers"),
        ("memory.cache=xl-cache", "memory.cache.use=xl-cache"),
        ("optimizer=lswt-core:adamw", "optimizer.use=lswt-core:adamw"),
        ('layers."every 4".positional=none', 'layers."every 4".positional.use=none'),
        ("layers.0-3.memory.xl=false", "layers.0-3.memory.xl=false"),
        ("model.bias=false", "model.bias=false"),
        ("loss.simctg = false", "loss.simctg=false"),
    ],
)
def test_swaps_are_overrides(swap: str, override: str) -> None:
    assert overrides_of(swap) == (override,)


@pytest.mark.parametrize(
    ("swap", "overrides"),
    [
        ("mixer=mamba2,memory.xl=false", ["mixer.use=mamba2", "memory.xl=false"]),
        ("mixer = mamba2, mixer.d_state = 8", ["mixer.use=mamba2", "mixer.d_state=8"]),
        (
            'layers."0,2".ffn=gelu,layers."1,3".norm=rmsnorm',
            ['layers."0,2".ffn.use=gelu', 'layers."1,3".norm.use=rmsnorm'],
        ),
        (
            'attention.prefer=["sdpa", "eager"],ffn=gelu',
            ['attention.prefer=["sdpa", "eager"]', "ffn.use=gelu"],
        ),
        (
            "ffn.inner={use='gelu', a=1},norm=rmsnorm",
            ["ffn.inner={use='gelu', a=1}", "norm.use=rmsnorm"],
        ),
        ('data.text="a,b=c"', ['data.text="a,b=c"']),
        ("data.text='a,b=c',ffn=gelu", ["data.text='a,b=c'", "ffn.use=gelu"]),
        ("data.text=a, b and c", ["data.text=a, b and c"]),
        ("data.text=it's,ffn=gelu", ["data.text=it's", "ffn.use=gelu"]),
    ],
)
def test_a_swap_names_several_keys(swap: str, overrides: list[str]) -> None:
    assert list(overrides_of(swap)) == overrides


@pytest.mark.parametrize("swap", ["ffn=gelu,ffn.use=glu", "ffn=gelu,ffn=gelu"])
def test_a_swap_names_a_key_once(swap: str) -> None:
    with pytest.raises(RecipeError, match=r"names ffn\.use twice"):
        overrides_of(swap)


@pytest.mark.parametrize("swap", ["ffn", "=gelu", "a b=3", "", ",ffn=gelu"])
def test_what_is_no_swap_is_refused(swap: str) -> None:
    with pytest.raises(RecipeError, match="AXIS=VALUE"):
        overrides_of(swap)


def test_newton_schulz_is_counted() -> None:
    """Each iteration multiplies X X^T, its square, and X: for m <= n, 2 m^2 n + 2 m^3 + 2 m^2 n; of
    experts for each.
    """
    recipe = recipe_of(
        loss={}, optimizer={"use": "muon", "ns_steps": 3}, ffn={"use": "moe", "n_experts": 3}
    )
    measured = budget(recipe, Registry(), WORLD)
    loss = build_model(recipe, Registry(), device=WORLD.device, dtype=torch.float32).loss
    hidden = [name for group in build_parameter_groups(loss) for name in group["matrices"]]
    weights = [loss.get_parameter(name) for name in hidden]
    assert sum(weight.ndim == 3 for weight in weights) == 2 * recipe.model.n_layers
    shapes = [(weight.shape[:-2].numel(), *sorted(weight.shape[-2:])) for weight in weights]
    products = sum(3 * count * (4 * m * m * n + 2 * m**3) for count, m, n in shapes)
    assert measured.flops is not None
    assert measured.flops.optimizer == products // recipe.train.tokens_per_step > 0
    plain = budget(recipe_of(loss={}, optimizer={"use": "adamw"}), Registry(), WORLD)
    assert plain.flops is not None
    assert plain.flops.optimizer == 0
