"""What ``evaluate`` prints of a run, computed again from its export by transformers and torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import inside, write_shallow_recipe
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from lswt_core import export_run
from lswt_core.__main__ import main

pytestmark = pytest.mark.slow
SEGMENT, SHORTER, CONTEXTS = 16, 8, (8, 16, 24)
TEXTS = ("sense and sensibility and prejud", "pride . sense pride and sensibili", "and . . pride")
WORDS = ["optimizer.lr=1e-2", "model.n_layers=2", "memory.xl.length=16"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run, its export, and a text to evaluate on."""
    root = tmp_path_factory.mktemp("exported")
    recipe = write_shallow_recipe(root)
    with pytest.MonkeyPatch.context() as patch:
        assert inside(patch, recipe, *WORDS, "--out", root / "run") == 0
        export_run(root / "run", root / "model")
    root.joinpath("text").mkdir()
    for number, text in enumerate(TEXTS):
        root.joinpath("text", f"{number}.txt").write_text(text)
    return root


@pytest.fixture(scope="module")
def report(directory: Path) -> dict[str, Any]:
    """What the command says of the run on the text."""
    lengths = ["--memory", f"0,{SHORTER}", "--context", ",".join(map(str, CONTEXTS))]
    words = ["evaluate", str(directory / "run"), "--text", str(directory / "text"), *lengths]
    with redirect_stdout(StringIO()) as printed:
        assert main([*words, "--json"]) == 0
    (report,) = json.loads(printed.getvalue())["texts"].values()
    return report


def documents(directory: Path) -> list[tuple[Tensor, Tensor]]:
    """Inputs and labels [tokens] of every text: BOS at its beginning, EOS at its end."""
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in TEXTS]
    return [(torch.tensor(one[:-1]), torch.tensor(one[1:])) for one in ids]


@torch.no_grad()
def losses(model: Any, inputs: Tensor, labels: Tensor, sizes: Sequence[int], carry: bool) -> Tensor:
    """Losses [tokens] of a text read in segments of ``sizes``, the cache carried along or not."""
    cache, parts = None, []
    for segment, asked in zip(inputs.split(sizes), labels.split(sizes), strict=True):
        out = model(segment[None], past_key_values=cache, use_cache=True)
        parts.append(F.cross_entropy(out.logits[0], asked, reduction="none"))
        cache = out.past_key_values if carry else None
    return torch.cat(parts)


def sizes_of(tokens: int) -> list[int]:
    """Whole segments, and what is left."""
    whole, rest = divmod(tokens, SEGMENT)
    return [SEGMENT] * whole + [rest] * (rest > 0)


def mean(parts: Sequence[Tensor]) -> Any:
    """What the mean of some losses is compared with."""
    return pytest.approx(float(torch.cat([*parts]).mean()), abs=1e-5)


def test_losses_with_and_without_memory_are_those_of_the_export(
    directory: Path, report: dict[str, Any]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory / "model")
    shorter = AutoModelForCausalLM.from_pretrained(directory / "model", memory_length=SHORTER)
    read: dict[Any, list[Tensor]] = {0: [], SHORTER: [], None: []}
    for inputs, labels in documents(directory):
        sizes = sizes_of(len(inputs))
        read[0].append(losses(model, inputs, labels, sizes, carry=False))
        read[SHORTER].append(losses(shorter, inputs, labels, sizes, carry=True))
        read[None].append(losses(model, inputs, labels, sizes, carry=True))
    assert report["loss"]["value"] == mean(read[None])
    assert [point["memory"] for point in report["memory"]] == [*read]
    for point in report["memory"]:
        own = read[point["memory"]]
        gains = [(without - some)[SEGMENT:] for without, some in zip(read[0], own, strict=True)]
        assert point["loss"]["value"] == mean(own)
        assert point["gain"]["value"] == mean(gains)
    assert report["memory"][-1]["gain"]["value"] > 1e-3


def test_losses_by_context_are_those_of_the_export(directory: Path, report: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory / "model")
    measured = report["effective_context"]
    for point, context in zip(measured["losses"], CONTEXTS, strict=True):
        last = []  # of every window that ends where the longest context has its tokens
        for inputs, labels in documents(directory):
            for end in range(max(CONTEXTS), len(inputs) + 1):
                window = slice(end - context, end)
                sizes = sizes_of(context)[::-1]  # the last segment is whole
                own = losses(model, inputs[window], labels[window], sizes, carry=True)
                last.append(own[-1:])
        assert measured["targets"] == len(last), "evaluate has drawn all there are"
        assert (point["context"], point["value"]) == (context, mean(last))
