"""Token files that ``tokenize`` writes: the same whoever writes them, and read as what they are."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import inside, write_recipe

from lswt_core.__main__ import main
from lswt_core.checkpoint import RunLock
from lswt_core.data import token_parts, unigram_perplexity
from lswt_core.data.concatenated import ConcatenatedIds
from lswt_core.data.corpus import (
    Corpus,
    open_corpus,
    open_held_out,
    open_training_rows,
    warn_of_many_nodes,
)
from lswt_core.data.make_directory import working_directory
from lswt_core.data.nodes import count_nodes
from lswt_core.data.token_file import TokenFileWriter
from lswt_core.data.token_parts import Share
from lswt_core.distributed.world import World
from lswt_core.errors import DataError
from lswt_core.interfaces import DataSource, Document
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry

SMALL = 1500  # characters of a part: the corpus of 12 files has 12,000


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LSWT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(token_parts, "PART_CHARACTERS", SMALL)
    return write_recipe(tmp_path)


def tokenize(recipe: Path, out: Path, *more: str) -> int:
    """The command's exit code."""
    return main(["tokenize", str(recipe), "--out", str(out), *more])


def files(directory: Path) -> dict[str, bytes]:
    """What a reader of a directory sees."""
    paths = [path for path in directory.rglob("*") if path.is_file() and ".work" not in path.parts]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def opened(recipe: Path, *overrides: str, world: World | None = None) -> Corpus:
    registry = Registry()
    loaded = Recipe.load(recipe, overrides, registry=registry)
    return open_corpus(loaded, registry, world or World(), lambda *_: None)


def directory_key(out: Path) -> str:
    return f"data.token_directory={out}"


# ---------- what is written


def mixed(corpus: Path, place: Path) -> list[str]:
    records = place / "records.jsonl"
    lines = [{"text": f"record {number} " * (number % 7)} for number in range(90)]
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [
        "data.use=mixture",
        "data.sources.a.use=text",
        f"data.sources.a.paths=['{corpus}']",
        "data.sources.b.use=jsonl",
        f"data.sources.b.paths=['{records}']",
    ]


SOURCES: dict[str, Callable[[Path, Path], list[str]]] = {
    "text": lambda corpus, place: [],
    "mixture, with empty documents": mixed,
    "trained tokenizer": lambda corpus, place: ["tokenizer.use=bpe", "tokenizer.vocab_size=300"],
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_run_reads_what_it_would_tokenise_itself(
    source: str, recipe: Path, tmp_path: Path
) -> None:
    keys = SOURCES[source](tmp_path / "corpus", tmp_path)
    assert tokenize(recipe, tmp_path / "out", *keys) == 0
    expected, found = opened(recipe, *keys), opened(recipe, *keys, directory_key(tmp_path / "out"))
    for ours, theirs in ((found.train, expected.train), (found.valid, expected.valid)):
        assert ours is not None and theirs is not None
        assert np.array_equal(ours.ids[:], theirs.ids) and ours.ids.dtype == theirs.ids.dtype
        assert np.array_equal(ours.document_starts, theirs.document_starts)
        assert list(ours.names) == list(theirs.names) and ours.fingerprint == theirs.fingerprint
        assert (ours.n_bytes, ours.n_empty) == (theirs.n_bytes, theirs.n_empty)
    assert found.fingerprint() == expected.fingerprint()
    one, other = (
        unigram_perplexity(corpus.train, corpus.valid, corpus.tokenizer.eos_id, 320)
        for corpus in (found, expected)
    )
    assert one == other
    assert len(list(tmp_path.glob("out/train-*.bin"))) >= 3


@pytest.mark.parametrize("order", [("1/3", "2/3", "3/3"), ("3/3", "1/3", "2/3")])
def test_parts_make_the_whole(order: Sequence[str], recipe: Path, tmp_path: Path) -> None:
    assert tokenize(recipe, tmp_path / "whole") == 0
    for part in order:
        assert not (tmp_path / "parts" / "index.json").exists()
        assert tokenize(recipe, tmp_path / "parts", "--part", part) == 0
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_parts_of_two_file_systems_are_copied_together(recipe: Path, tmp_path: Path) -> None:
    assert tokenize(recipe, tmp_path / "whole") == 0
    for number in (1, 2):
        assert tokenize(recipe, tmp_path / str(number), "--part", f"{number}/2") == 0
        assert not (tmp_path / str(number) / "index.json").exists()
    for path in (tmp_path / "2").glob("*.bin"):
        shutil.copy(path, tmp_path / "1")
    assert tokenize(recipe, tmp_path / "1", "--part", "1/2") == 0
    assert files(tmp_path / "1") == files(tmp_path / "whole")


def test_more_parts_than_files(recipe: Path, tmp_path: Path) -> None:
    assert tokenize(recipe, tmp_path, "--part", "50/50") == 0
    assert not list(tmp_path.glob("*.bin"))


def test_the_same_command_again_changes_nothing(recipe: Path, tmp_path: Path) -> None:
    assert tokenize(recipe, tmp_path / "out") == 0
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.*")}
    assert tokenize(recipe, tmp_path / "out") == 0
    assert {path: path.stat().st_mtime_ns for path in written} == written


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], list[int]]:
    """Do something at the nth piece of text; returns the tokens of all that were written."""
    plain = TokenFileWriter.add_ids

    def stop(at: int, action: Callable[[], None]) -> list[int]:
        counted: list[int] = []

        def add_ids(self: TokenFileWriter, ids: list[int]) -> None:
            counted.append(len(ids))
            if len(counted) == at:
                action()
            plain(self, ids)

        monkeypatch.setattr(TokenFileWriter, "add_ids", add_ids)
        return counted

    return stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_loses_a_file_at_most(
    number: signal.Signals, recipe: Path, tmp_path: Path, stopping: Any
) -> None:
    assert tokenize(recipe, tmp_path / "whole") == 0
    stopping(17, lambda: signal.raise_signal(number))
    assert tokenize(recipe, tmp_path / "out") == 75
    headers = [token_parts.read_part_header(path) for path in (tmp_path / "out").glob("*.bin")]
    kept = sum(header["documents"] for header in headers if header)
    assert kept and not (tmp_path / "out" / "index.json").exists()
    done = stopping(0, lambda: None)
    assert tokenize(recipe, tmp_path / "out") == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert len(done) == 24 - kept  # one piece of each of 12 files in both splits


KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
from lswt_core.__main__ import main
from lswt_core.data import make_directory, token_parts
from lswt_core.data.token_file import TokenFileWriter
import lswt_core.data.token_index, tokenizers
token_parts.PART_CHARACTERS = {small}

def killing(owner, name, at):
    plain, calls = getattr(owner, name), []
    def called(*given, **named):
        calls.append(0)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*given, **named)
    setattr(owner, name, called)

points = [(TokenFileWriter, "add_ids", n) for n in (1, 4, 9)]
points += [(TokenFileWriter, "finish", 3), (token_parts, "publish", 2), (token_parts, "publish", 5)]
points += [(lswt_core.data.token_index, "write_atomically", n) for n in (1, 2)]
for point in points:
    for part in ("1/2", "2/2"):
        child = os.fork()
        if child == 0:
            if part == "1/2":
                killing(*point)
            os._exit(main(["tokenize", {recipe!r}, "--out", {out!r}, "--part", part]))
        print(part, os.waitpid(child, 0)[1], flush=True)
        if part == "1/2" and len(sys.argv) == 1:
            break  # the other part runs only at the last
print("end", main(["tokenize", {recipe!r}, "--out", {out!r}]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("beside", [(), ("with part 2",)])
def test_killed_at_any_point_and_started_again(
    beside: Sequence[str], recipe: Path, tmp_path: Path
) -> None:
    assert tokenize(recipe, tmp_path / "whole") == 0
    path = [str(Path(__file__).parent), *sys.path]
    code = KILLED.format(path=path, recipe=str(recipe), out=str(tmp_path / "out"), small=SMALL)
    done = subprocess.run([sys.executable, "-c", code, *beside], capture_output=True, text=True)
    killed = [line for line in done.stdout.splitlines() if line == "1/2 9"]
    assert done.stdout.splitlines()[-1] == "end 0", done.stderr
    assert len(killed) >= 4, done.stdout
    assert files(tmp_path / "out") == files(tmp_path / "whole")


# ---------- what is refused while it is written


@pytest.mark.parametrize("part", ["0/3", "4/3", "x", "1", "1/0", "-1/2"])
def test_a_part_that_is_none(part: str, recipe: Path, tmp_path: Path) -> None:
    assert tokenize(recipe, tmp_path / "out", f"--part={part}") == 2
    assert not (tmp_path / "out").exists()


def test_the_same_part_twice_at_once(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLock(working_directory(tmp_path / "out", Share(1, 2))):
        assert tokenize(recipe, tmp_path / "out", "--part", "1/2") == 73
        assert str(os.getpid()) in capsys.readouterr().err
        assert tokenize(recipe, tmp_path / "out", "--part", "2/2") == 0


@pytest.mark.parametrize("key", ["tokenizer.use=bpe", "data.valid_share=0.3"])
def test_a_directory_of_another_text_is_not_added_to(
    key: str, recipe: Path, tmp_path: Path
) -> None:
    assert tokenize(recipe, tmp_path / "out") == 0
    before = files(tmp_path / "out")
    assert tokenize(recipe, tmp_path / "out", key) == 4
    after = files(tmp_path / "out")
    assert {name: after[name] for name in before} == before


def test_a_full_disk(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        (tmp_path / "out" / ".work" / "1-of-1").mkdir(parents=True)
        patch.setattr(os, "fsync", full)
        assert tokenize(recipe, tmp_path / "out") == 7
    assert "disk space" in capsys.readouterr().err
    assert tokenize(recipe, tmp_path / "out") == 0


def test_a_text_without_documents(recipe: Path, tmp_path: Path) -> None:
    for file in (tmp_path / "corpus").iterdir():
        file.write_text("")
    assert tokenize(recipe, tmp_path / "out") == 4
    assert not (tmp_path / "out" / "index.json").exists()


# ---------- what a run refuses


@pytest.fixture
def out(recipe: Path, tmp_path: Path) -> Path:
    assert tokenize(recipe, tmp_path / "out") == 0
    return tmp_path / "out"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)


def edit(path: Path) -> None:
    path.write_text(path.read_text().replace("sense", "Sense"))


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "unreachable": (lambda out: shutil.rmtree(out), "there is no directory"),
    "empty": (
        lambda out: [path.unlink() for path in out.iterdir() if path.is_file()],
        "holds no token files",
    ),
    "no index": (lambda out: (out / "index.json").unlink(), "not complete"),
    "a part is missing": (lambda out: (out / "train-00001.bin").unlink(), r"train-00001\.bin is"),
    "cut short": (lambda out: os.truncate(out / "train-00001.bin", 99), r"00001\.bin has 99 bytes"),
    "damaged": (lambda out: flip(out / "train-00002.bin"), r"train-00002\.bin is damaged"),
    "counts": (lambda out: flip(out / "label-counts.bin"), r"label-counts\.bin is damaged"),
    "index changed": (
        lambda out: (out / "index.json").write_text(
            (out / "index.json").read_text().replace('"n_empty": 0', '"n_empty": 1')
        ),
        "was changed",
    ),
    "no JSON": (lambda out: (out / "index.json").write_text("{"), "is damaged"),
    "text edited": (lambda out: edit(out.parent / "corpus" / "3.txt"), "text has changed"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_directory_that_does_not_hold_the_text(how: str, recipe: Path, out: Path) -> None:
    spoil, message = SPOILED[how]
    opened(recipe, directory_key(out))
    spoil(out)
    with pytest.raises(DataError, match=message) as raised:
        opened(recipe, directory_key(out))
    assert raised.value.exit_code == 4
    assert "tokenize" in str(raised.value)


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("tokenizer.use=bpe", "tokenizer.use: 'bytes' there, 'bpe' here"),
        ("data.valid_share=0.3", "data.valid_share: 0.03125 there, 0.3 here"),
        ("data.paths=['elsewhere']", "data.paths"),
    ],
)
def test_a_directory_of_another_recipe(key: str, named: str, recipe: Path, out: Path) -> None:
    with pytest.raises(DataError, match=named):
        opened(recipe, key, directory_key(out))


def test_the_text_need_not_be_there(
    recipe: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = opened(recipe)
    shutil.rmtree(recipe.parent / "corpus")
    found = opened(recipe, directory_key(out))
    assert found.fingerprint() == expected.fingerprint() and "is not here" in caplog.text


def test_a_trained_tokenizer_comes_with_its_token_files(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ["tokenizer.use=bpe", "tokenizer.vocab_size=300"]
    assert tokenize(recipe, tmp_path / "out", *keys) == 0
    monkeypatch.setenv("LSWT_CACHE_DIR", str(tmp_path / "another"))
    shutil.rmtree(tmp_path / "corpus")
    assert opened(recipe, *keys, directory_key(tmp_path / "out")).tokenizer.vocab_size > 258


def test_round_robin_is_of_streams(recipe: Path, out: Path) -> None:
    keys = ["train.document_assignment='round-robin'", directory_key(out)]
    with pytest.raises(Exception, match="round-robin") as raised:
        opened(recipe, *keys)
    assert getattr(raised.value, "exit_code", None) == 2


@pytest.mark.parametrize("word", ["data.token_directory=5", 'data.token_directory=""'])
def test_the_key_names_a_directory(word: str, recipe: Path) -> None:
    assert main(["resolve", str(recipe), word]) == 2


# ---------- ranks


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that wait for nobody: none is there."""
    monkeypatch.setattr(World, "wait", lambda self: None)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_rows_are_the_same_on_any_number_of_ranks(
    size: int, recipe: Path, out: Path, alone: None
) -> None:
    loaded = Recipe.load(recipe)
    plain, own = opened(recipe), directory_key(out)
    expected = open_training_rows(loaded, plain, World())
    held_out = open_held_out(loaded, plain, World(), 1.0).rows
    worlds = [World(rank, size) for rank in range(size)]
    texts = [opened(recipe, own, world=world) for world in worlds]
    pairs = list(zip(texts, worlds, strict=True))
    ranks = [open_training_rows(loaded, text, world) for text, world in pairs]
    for _ in range(800 // 16):  # tokens of a row in an epoch and more
        inputs = torch.cat([rows.segment().inputs for rows in ranks])
        assert torch.equal(inputs, expected.segment().inputs)
        for rows in (*ranks, expected):
            rows.advance()
    assert all(rows.state() == expected.state() for rows in ranks)
    for text, world in pairs:
        found = open_held_out(loaded, text, world, 1.0).rows
        assert torch.equal(found.segment().labels, held_out.segment().labels[found.rows])
    for rows in (*ranks, expected):
        rows.close()


def test_every_file_is_checked_by_one_rank(recipe: Path, out: Path, alone: None) -> None:
    flip(out / "train-00002.bin")
    failed = 0
    for rank in range(4):
        try:
            opened(recipe, directory_key(out), world=World(rank, 4))
        except DataError as error:
            failed += 1
            assert "train-00002.bin" in str(error)
    assert failed == 1


def test_ids_of_many_files_are_those_of_one() -> None:
    generator = np.random.default_rng(0)
    whole = generator.integers(0, 9999, 1000, dtype=np.uint16)
    cuts = np.sort(generator.choice(1000, 6))
    ids = ConcatenatedIds(np.split(whole, [*cuts, cuts[-1]]))  # one of them empty
    places = generator.integers(0, 1000, (7, 50))
    assert np.array_equal(ids[places], whole[places]) and len(ids) == 1000
    assert ids[places[:0]].shape == (0, 50)
    around = [(cuts[0], cuts[2]), (cuts[1] - 1, cuts[1] + 1)]
    for begin, end in [(0, 1000), (3, 3), *around, (5, 9999)]:
        assert np.array_equal(ids[begin:end], whole[begin:end])


# ---------- whole runs


@pytest.mark.slow
def test_a_run_with_token_files_is_the_run_without(
    recipe: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ["train.steps=3", "schedule.warmup_steps=1", "checkpoint.every=2"]
    runs = [recipe.parent / "with", recipe.parent / "without"]
    assert inside(monkeypatch, recipe, *steps, directory_key(out), "--out", runs[0]) == 0
    assert inside(monkeypatch, recipe, *steps, "--out", runs[1]) == 0
    logs = [(run / "metrics.jsonl").read_text().splitlines() for run in runs]
    losses = [[json.loads(line).get("loss") for line in log] for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) >= 3
    # the key may come and go: the tokens are the same
    more = [*steps, "--accept-changes", "train.steps=5"]
    assert inside(monkeypatch, recipe, *more, directory_key(out), "--out", runs[1]) == 0
    shutil.rmtree(out)
    assert inside(monkeypatch, recipe, *steps, directory_key(out), "--out", runs[0] / "x") == 4


# ---------- sources with states


class Stream(DataSource):
    """Numbered documents, and how many of them were read."""

    name, streaming = "stream", True

    def __init__(self, count: int) -> None:
        self.count, self.read, self.place = count, 0, 0

    def documents(self, split: str, after: Any = None) -> Iterator[Document]:
        for number in range(after["place"] if after else 0, self.count):
            self.read, self.place = self.read + 1, number + 1
            yield Document(f"{split}/{number}", f"document {number}, " * (number % 5))

    def state(self) -> dict[str, int]:
        return {"place": self.place}

    def fingerprint(self) -> str:
        return str(self.count)


def test_parts_begin_at_a_state(recipe: Path, tmp_path: Path) -> None:
    from lswt_bytes import Bytes

    def text(source: DataSource) -> token_parts.PartedText:
        fingerprints = {"train": "t", "valid": "v"}
        return token_parts.PartedText(tmp_path, source, Bytes(), fingerprints)

    first = token_parts.SplitParts(text(Stream(600)), "train")
    token_parts.write_missing_parts(first, Share(), tmp_path, lambda _: None)
    expected = files(tmp_path)
    assert first.count is not None and first.count > 5
    last = first.count - 1
    first.text.path("train", last).unlink()
    source = Stream(600)
    again = token_parts.SplitParts(text(source), "train")
    token_parts.write_missing_parts(again, Share(), tmp_path, lambda _: None)
    assert files(tmp_path) == expected
    assert source.read < 600 / last  # a part's, not all


@pytest.mark.parametrize(
    ("environment", "nodes"),
    [
        ({}, 1),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, 1),
        ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, 2),
        ({"WORLD_SIZE": "16", "SLURM_NNODES": "4"}, 4),
        ({"SLURM_NNODES": "4"}, 1),
        ({"WORLD_SIZE": "2"}, 1),
    ],
)
def test_machines_are_counted(environment: dict[str, str], nodes: int) -> None:
    assert count_nodes(environment) == nodes


def test_a_stream_is_unfit_for_many_machines(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_many_nodes(Stream(1))
    assert not caplog.text
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    warn_of_many_nodes(Stream(1))
    assert "tokenize" in caplog.text and "2 machines" in caplog.text


# ---------- memory

MEASURED = """
import resource, sys
sys.path[:0] = {path!r}
from pathlib import Path
from lswt_bytes import Bytes
from lswt_core.interfaces import DataSource, Document
from lswt_core.data import token_parts
class Long(DataSource):
    name = "long"
    def documents(self, split):
        for number in range(int(sys.argv[1]) * 250):
            yield Document(str(number), "the same line of text\\n" * 182)
    def fingerprint(self):
        return "long"
text = token_parts.PartedText(Path(sys.argv[2]), Long(), Bytes(), {{"train": "t", "valid": "v"}})
parts = token_parts.SplitParts(text, "train")
token_parts.write_missing_parts(parts, token_parts.Share(), Path(sys.argv[2]), lambda _: None)
print(parts.count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    code = MEASURED.format(path=[str(Path(__file__).parent), *sys.path])
    measured = []
    for megabytes in ("40", "120"):
        place = tmp_path / megabytes
        place.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", code, megabytes, str(place)],
            capture_output=True,
            text=True,
            check=True,
        )
        measured.append([int(word) for word in done.stdout.split()])
    (few, small), (many, large) = measured
    assert many > few and large - small < 20  # MB
