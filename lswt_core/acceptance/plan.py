"""The items of the acceptance, in order of worth, for a device or for the rehearsal on a CPU.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from operator import attrgetter
from typing import Any, NamedTuple

from lswt_core.acceptance.item import Item
from lswt_core.registry import Registry
from lswt_core.registry.offer import AUTO

ORACLES = ("eager", AUTO.name)  # the definition itself, and a choice of the others
COMPILING = {"flex"}  # every case anew
FIRST = 3  # benchmarks that are worth more than a check of these
CHECKS = "lswt_core.acceptance"
LIMIT = 3.0  # times its estimate: then an item is killed
MARGIN = 45.0  # seconds more: a process starts, libraries are loaded, kernels compiled
GB = 10**9

# W1, W0 without memory: what a decoder with a remembered segment costs beside a plain one
PLAIN_WORK = (
    "optimizer.use=adamw",
    "optimizer.lr=3e-4",
    "embedding.warm_start=none",
    "loss.simctg=false",
)
NO_MEMORY = "memory.xl=false,memory.registers=false"
NANO = (
    "model.d_model=32",
    "model.n_layers=2",
    "model.n_heads=2",
    "embedding.vocab_size=512",
    "embedding.d_vocab=32",
    "embedding.warm_start=none",
    "memory.xl.length=32",
    "train.seq_len=32",
    "train.batch_size=2",
    "train.micro_batch_size=2",
)


class Bench(NamedTuple):
    """A benchmark: what it is for, the command's words, and its estimate on an H100."""

    name: str
    what: str
    words: tuple[str, ...]
    seconds: float
    aim: float | None = None
    libraries: tuple[str, ...] = ()
    memory: int = 0
    rehearsal: float = 15  # seconds, estimated, on a CPU


BENCHES = (
    Bench(
        "memory's price, tiny",
        "with a memory of 2,048 at least 0.8 of the tokens/s without (W1/W0); MFU, decoding",
        ("tiny", *PLAIN_WORK, "--swap", NO_MEMORY),
        70,
        aim=0.8,
    ),
    Bench(
        "original, tiny",
        "the original's way, its cache in host memory, takes 3.5 times as long",
        ("tiny", "--against", "original"),
        90,
        aim=3.5,
    ),
    Bench(
        "memory's price, medium",
        "at least 0.8 of the tokens/s without (W1/W0); MFU of at least 45 %",
        ("medium", *PLAIN_WORK, "train.micro_batch_size=4", "--swap", NO_MEMORY),
        110,
        aim=0.8,
        memory=70 * GB,
    ),
    Bench(
        "x-transformers, tiny",
        "with its memory it takes 3 times as long",
        ("tiny", "--against", "x-transformers-tuned"),
        80,
        aim=3.0,
        libraries=("x_transformers",),
    ),
    Bench(
        "llama compiled, tiny",
        "transformers' Llama, compiled, without memory, takes 1.3 times as long",
        ("tiny", "--against", "llama-tuned"),
        90,
        aim=1.3,
        libraries=("transformers",),
        rehearsal=120,
    ),
    Bench(
        "original, medium",
        "the original's way, its cache in host memory, takes 3 times as long",
        ("medium", "train.micro_batch_size=2", "--against", "original", "--rounds", "5"),
        130,
        aim=3.0,
        memory=130 * GB,
    ),
    Bench(
        "loss, tiny",
        "larger chunks, and all logits at once, beside the default",
        (
            "tiny",
            *PLAIN_WORK,
            "--swap",
            "cross_entropy.chunk=4096",
            "--swap",
            "cross_entropy=dense",
        ),
        70,
    ),
    Bench(
        "xl on one device",
        "7.3 billion parameters with bfloat16 moments and activation checkpointing; MFU",
        (
            "xl",
            "train.batch_size=4",
            "train.micro_batch_size=1",
            "optimizer.moments=bfloat16",
            "embedding.warm_start=none",
            "train.activation_checkpointing=block",
            "--rounds",
            "3",
            "--tokens",
            "8",
        ),
        150,
        memory=125 * GB,
    ),
)


def items_for(machine: Mapping[str, Any]) -> list[Item]:
    """All items for a machine, as ``describe_machine`` tells it."""
    on_cpu = machine["type"] == "cpu"
    names = {offer.name for offer in Registry().offers() if offer.kind == "attention"}
    quick = sorted(names.difference(ORACLES, COMPILING))
    checks = [
        *attention_items(quick, on_cpu),
        *cross_entropy_items(on_cpu),
        *update_items(on_cpu),
        *other_items(on_cpu, int(machine["count"])),
        memory_backward_item(on_cpu),
    ]
    flex = attention_items(sorted(names & COMPILING), on_cpu)
    benches = [bench_item(bench, on_cpu) for bench in BENCHES]
    if on_cpu:  # what compiles would take the rehearsal's whole time
        later = [*benches, compiled_item(on_cpu)]
        return [*checks, *flex, *sorted(later, key=attrgetter("seconds"))]
    return [*checks, compiled_item(on_cpu), *benches[:FIRST], *flex, *benches[FIRST:]]


def check(name: str, asserts: str, target: str, seconds: float, **arguments: Any) -> Item:
    """A check; those of one module share a process."""
    module, _, _ = target.partition(":")
    limit = LIMIT * seconds + MARGIN
    return Item(name, asserts, f"{CHECKS}.{target}", arguments, seconds, limit, module)


def attention_items(names: Iterable[str], on_cpu: bool) -> Iterator[Item]:
    """Attention backends, each in float32 and bfloat16."""
    for name in names:
        for dtype in ("bfloat16", "float32"):
            yield check(
                f"attention/{name} {dtype}",
                "output and gradients in every case are as far from float64 as plain attention's in"
                " this dtype, up to a factor of 2 (outputs of blocks are rounded once more)",
                "attention:check_backend",
                60 if name in COMPILING and not on_cpu else 4,
                backend=name,
                dtype=dtype,
            )


def compiled_item(on_cpu: bool) -> Item:
    """Compiled blocks."""
    return check(
        "compiled blocks",
        "two graphs for all blocks, two at most for the loss, no break, none after the second"
        " segment; losses equal but for the rounding of fused sums",
        "updates:check_compiled",
        90 if on_cpu else 45,
    )


def memory_backward_item(on_cpu: bool) -> Item:
    """The time of what remembered keys and values do not need."""
    return check(
        "memory's backward/sdpa",
        "it runs: the ratio is the time of a backward pass towards the queries alone to that of the"
        " whole one, by matrix products 0.6; on a CPU the two are one",
        "memory_backward:time_memory_backward",
        2 if on_cpu else 15,
        backend="sdpa",
        dtype="bfloat16",
    )


def update_items(on_cpu: bool) -> Iterator[Item]:
    """Checks of whole updates."""
    seconds = 5 if on_cpu else 10
    yield check(
        "memories on the host",
        "states and losses of three updates with two micro-batches equal those of memories on the"
        " device, but for rounding; on a CPU the two are one",
        "updates:check_host_memory",
        seconds,
    )
    yield check(
        "background checkpoint",
        "its files are byte for byte those of a checkpoint for which training waited",
        "updates:check_background_checkpoint",
        seconds,
    )
    yield check(
        "host waits",
        "of an update two (counts of labels, metrics) and one for each statistic of the optimizer;"
        " on a CPU there are none to count",
        "updates:check_waits",
        seconds,
    )


def cross_entropy_items(on_cpu: bool) -> Iterator[Item]:
    """Checks of cross-entropies."""
    compiled_ones = [] if on_cpu else [("chunked", True)]
    for name, compiled in (("chunked", False), *compiled_ones, ("liger", False)):
        yield check(
            f"cross-entropy/{name}{' compiled' if compiled else ''}",
            "loss and gradients are as far from float64 as those of all logits at once in bfloat16,"
            " up to a factor of 2",
            "cross_entropy:check_cross_entropy",
            4 if on_cpu else 12,
            use=name,
            dtype="bfloat16",
            compiled=compiled,
        )


def other_items(on_cpu: bool, count: int) -> Iterator[Item]:
    """Checks of sharding, decoding and a run."""
    yield check(
        "sharding/mesh of one",
        "losses and weights after three updates equal those of a model that is not sharded",
        "updates:check_mesh_of_one",
        5 if on_cpu else 10,
    )
    yield check(
        "recorded decoding",
        "hidden states of recorded steps equal those of the slow path, token by token, but for"
        " rounding; on a CPU the step is not recorded",
        "decoding:check_recorded",
        5 if on_cpu else 12,
    )
    yield check(
        "a run",
        "evaluation, checkpoint, sample and report are written, and the loss falls",
        "runs:check_run",
        20,
    )
    yield check(
        "sharding/all devices",
        "losses of a run that is cut over all devices equal those on one, but for rounding",
        "runs:check_all_devices",
        60 if count > 1 else 1,
        processes=count,
    )


def bench_item(bench: Bench, on_cpu: bool) -> Item:
    """A benchmark, at nano shapes on a CPU."""
    words, seconds = bench.words, bench.seconds
    if on_cpu:
        words, seconds = (*words, *NANO, "--rounds", "1", "--tokens", "2"), bench.rehearsal
    return Item(
        f"bench/{bench.name}",
        bench.what,
        "lswt_core.acceptance.benchmarks:run_benchmark",
        {"words": words, "aim": None if on_cpu else bench.aim},
        seconds,
        LIMIT * seconds + MARGIN,
        "benchmarks",
        bench.libraries,
        0 if on_cpu else bench.memory,
    )
