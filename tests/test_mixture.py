"""The mixture of data sources: its order and proportions, and where an epoch ends."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import tomli
from data_parts import Given
from helpers import ROOT
from lswt_mixture import Mixture
from runs import inside, write_recipe

from lswt_core import Recipe, Registry
from lswt_core.checkpoint import Store
from lswt_core.data.cache_keys import cache_key
from lswt_core.decode.load_run import load_run
from lswt_core.errors import DataError, Incompatible
from lswt_core.interfaces import DataSource, Document
from lswt_core.model.components import build_component
from lswt_core.recipe import toml_writer

LONG = Given(["a" * (1 + 13 * i % 29) for i in range(300)], ["va" * 3, "vb", "vc" * 9])
SHORT = Given(["b" * (1 + 7 * i % 11) for i in range(40)], ["wa", "wb"])
SOURCES: dict[str, DataSource] = {"long": LONG, "short": SHORT}


def read(mixture: Mixture, split: str = "train") -> list[Document]:
    return list(mixture.documents(split))


def amounts(documents: list[Document], unit: str) -> dict[str, int]:
    """What each source gave."""
    counts: Counter[str] = Counter()
    for document in documents:
        size = len(document.text.encode()) if unit == "bytes" else 1
        counts[document.id.partition("/")[0]] += size
    return counts


def definition(texts: dict[str, list[str]], weights: dict[str, int], unit: str) -> list[str]:
    """The order in exact arithmetic: always from the source furthest below its share."""
    counts = dict.fromkeys(sorted(texts), Fraction(0))
    place, order = dict.fromkeys(texts, 0), list[str]()
    while True:
        total, shares = sum(counts.values()), sum(weights.values())
        behind = {name: counts[name] - total * weights[name] / shares for name in counts}
        name = min(counts, key=lambda name: (behind[name] / weights[name], name))
        if place[name] == len(texts[name]):
            return order
        text = texts[name][place[name]]
        order.append(f"{name}/{text}")
        place[name] += 1
        counts[name] += len(text) if unit == "bytes" else 1


@pytest.mark.parametrize("unit", ["bytes", "documents"])
@pytest.mark.parametrize("weights", [{"long": 3, "short": 1}, {"long": 2, "short": 5}])
def test_the_order_is_that_of_the_definition(unit: str, weights: dict[str, int]) -> None:
    mixture = Mixture(sources=SOURCES, weights=weights, unit=unit)
    order = [f"{one.id.partition('/')[0]}/{one.text}" for one in read(mixture)]
    texts = {"long": LONG.texts["train"], "short": SHORT.texts["train"]}
    assert order == definition(texts, weights, unit) and len(order) > 40


@pytest.mark.parametrize("unit", ["bytes", "documents"])
def test_proportions_hold_at_every_point(unit: str) -> None:
    weights = {"long": 3.0, "short": 1.0}
    documents = read(Mixture(sources=SOURCES, weights=weights, unit=unit))
    largest = 30 if unit == "bytes" else 1
    for size in range(1, len(documents) + 1):
        counts = amounts(documents[:size], unit)
        total = sum(counts.values())
        for name, weight in weights.items():
            assert abs(counts[name] - total * weight / 4) < largest


def test_an_epoch_ends_with_the_first_source_or_with_the_last() -> None:
    first = read(Mixture(sources=SOURCES, unit="documents"))
    assert amounts(first, "documents") == {"long": 41, "short": 40}
    last = read(Mixture(sources=SOURCES, unit="documents", stop="all-exhausted"))
    assert amounts(last, "documents") == {"long": 300, "short": 300}
    own = [one.text for one in last if one.id.startswith("short")]
    assert own == [SHORT.texts["train"][i % 40] for i in range(300)]
    assert [one.text for one in last if one.id.startswith("long")] == LONG.texts["train"]


@pytest.mark.parametrize("stop", ["first-exhausted", "all-exhausted"])
def test_held_out_text_is_mixed_and_counts_once(stop: str) -> None:
    mixture = Mixture(sources=SOURCES, unit="documents", stop=stop)
    assert [one.text for one in read(mixture, "valid")] == ["va" * 3, "wa", "vb", "wb", "vc" * 9]


def test_a_source_without_text_is_an_error() -> None:
    sources = {"long": LONG, "none": Given([], [])}
    for stop in ("first-exhausted", "all-exhausted"):
        with pytest.raises(DataError, match="'none' of the mixture"):
            read(Mixture(sources=sources, stop=stop))


def test_neither_names_nor_weights_may_be_missing() -> None:
    with pytest.raises(ValueError, match="no sources"):
        Mixture(sources={})
    with pytest.raises(ValueError, match="sources are long, short"):
        Mixture(sources=SOURCES, weights={"long": 1.0})


def test_the_order_of_the_table_does_not_matter() -> None:
    turned = Mixture(sources=dict(reversed(SOURCES.items())))
    assert read(turned) == read(Mixture(sources=SOURCES))
    assert turned.fingerprint() == Mixture(sources=SOURCES).fingerprint()


def test_the_fingerprint_sees_all_that_decides_the_text() -> None:
    other = Given(["b" * 3], ["w"])
    mixtures = [
        Mixture(sources=SOURCES),
        Mixture(sources=SOURCES, weights={"long": 1.0, "short": 2.0}),
        Mixture(sources=SOURCES, unit="documents"),
        Mixture(sources=SOURCES, stop="all-exhausted"),
        Mixture(sources={"long": LONG, "other": SHORT}),
        Mixture(sources={"long": LONG, "short": other}),
    ]
    assert len({mixture.fingerprint() for mixture in mixtures}) == len(mixtures)


class Sized(Given):
    """A source that knows its size, and perhaps streams."""

    streaming = True

    def n_bytes(self, split: str) -> int:
        return sum(len(text) for text in self.texts[split])


def test_size_and_streaming_are_those_of_the_sources() -> None:
    sized = {"a": Sized(["x" * 100] * 10, ["y"]), "b": Sized(["z" * 50] * 6, ["y"])}
    weights = {"a": 3.0, "b": 1.0}
    assert Mixture(sources=sized, weights=weights).n_bytes("train") == 300 * 4
    whole = Mixture(sources=sized, weights=weights, stop="all-exhausted")
    assert whole.n_bytes("train") == round(1000 / 3 * 4) and whole.streaming
    assert Mixture(sources=sized, stop="all-exhausted").n_bytes("train") == 2000
    assert Mixture(sources=sized, unit="documents").n_bytes("train") is None
    assert Mixture(sources=SOURCES).n_bytes("train") is None
    assert not Mixture(sources=SOURCES).streaming
    assert Mixture(sources={**sized, "c": LONG}).streaming


class Placed(Given):
    """A source that reads on from a state."""

    def documents(self, split: str, after: Any = None) -> Iterator[Document]:
        self.place = after["place"] if after else 0
        for document in [*super().documents(split)][self.place :]:
            self.place += 1
            yield document

    def state(self) -> dict[str, int]:
        return {"place": self.place}


@pytest.mark.parametrize("stop", ["first-exhausted", "all-exhausted"])
def test_a_mixture_reads_on_from_any_state(stop: Any) -> None:
    def mixture() -> Mixture:
        long, short = Placed([f"{i} " * 9 for i in range(30)]), Placed(["a", "bc", "d" * 50])
        sources: dict[str, DataSource] = {"long": long, "short": short}
        return Mixture(sources=sources, weights={"long": 3.0, "short": 1.0}, stop=stop)

    whole = list(mixture().documents("train"))
    reading = mixture()
    for number, _ in enumerate(reading.documents("train"), 1):
        state = json.loads(json.dumps(reading.state()))
        assert list(mixture().documents("train", after=state)) == whole[number:]
    assert number > (30 if stop == "all-exhausted" else 9)


def test_a_mixture_has_no_state_where_a_source_has_none() -> None:
    mixture = Mixture(sources={"a": Placed(["a", "b"]), "b": Given(["c", "d"])})
    assert mixture.state() is None
    documents = mixture.documents("train")
    assert [mixture.state() is None for _ in documents] == [False, True, True, True]


# ---------- in a recipe


def recipe_of(tmp_path: Path, **more: object) -> Recipe:
    for name in ("prose", "code"):
        for number in range(8):
            path = tmp_path / name / f"{number}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"{name} {number}\n" * (1 + number))
    data = {
        "use": "mixture",
        "sources": {
            "prose": {"use": "text", "paths": [str(tmp_path / "prose")]},
            "code": {"use": "text", "paths": [str(tmp_path / "code")]},
        },
    }
    return Recipe.from_dict({"train": {"steps": 1}, "data": data | more})


def test_a_recipe_mixes_and_caches_by_content(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    source = build_component(Registry(), recipe.one("data"))
    names = {one.id.partition("/")[0] for one in source.documents("train")}
    assert names == {"prose", "code"}
    key = cache_key("0", recipe.one("data"))
    weighted = recipe_of(tmp_path, weights={"prose": 1.0, "code": 2.0})
    assert key == cache_key("0", recipe_of(tmp_path).one("data"))
    assert key != cache_key("0", weighted.one("data"))
    json.dumps(recipe.resolved())


def test_weights_of_other_names_are_refused_with_their_table(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, weights={"prose": 1.0, "cod": 2.0})
    with pytest.raises(Incompatible, match=r"\[data\] mixture .*cod, prose.*code, prose"):
        build_component(Registry(), recipe.one("data"))


class Endless(DataSource):
    """A stream without end."""

    name = "endless"
    streaming = True

    def documents(self, split: str) -> Iterator[Document]:
        while True:
            yield Document("x", "x")

    def fingerprint(self) -> str:
        return "endless"


def test_nothing_is_read_ahead_of_what_is_asked_for() -> None:
    documents = Mixture(sources={"a": Endless(), "b": Endless()}).documents("train")
    assert [next(documents).id for _ in range(4)] == ["a/x", "b/x", "a/x", "b/x"]


def test_the_guides_example_is_a_recipe() -> None:
    guide = (ROOT / ".github" / "guide.md").read_text()
    (text,) = re.findall(r"```toml\n(\[data\].*?)```", guide, re.DOTALL)
    recipe = Recipe.from_dict({"train": {"steps": 1}, **tomli.loads(text)})
    assert [one.name for one in recipe.components() if one.kind == "data"] == [
        "mixture",
        "stdlib",
        "text",
    ]


def test_a_run_records_the_code_of_what_is_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nano, table = write_recipe(tmp_path), recipe_of(tmp_path).resolved()["data"]
    text = nano.read_text().partition("[data]")
    rest = text[2].partition("\n[")
    nano.write_text(text[0] + toml_writer.document({"data": table}) + f"\n[{rest[2]}")
    words = ["ffn.use=shared-expert", "ffn.shared.use=relu2", "ffn.routed.use=swiglu"]
    assert inside(monkeypatch, nano, *words, "--out", "run", "train.steps=2") == 0
    saved = Store(tmp_path / "run" / "checkpoints").newest(print)
    assert saved is not None
    components = saved.document("components")
    assert {"data/mixture", "data/text", "ffn/shared-expert", "ffn/relu2"} <= components.keys()
    run = load_run(tmp_path / "run", Registry())
    assert run.recipe.one("ffn").options["shared"].name == "relu2"
