"""The command that lets a trained model write, as a user types it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from nano import NANO
from processes import environment, run
from safetensors.torch import load_file

from lswt_core.__main__ import main
from lswt_core.decode.load_run import load_run
from lswt_core.registry import Registry

RECIPE = (
    NANO
    + """
[memory.xl]
use = "xl-cache"
length = 64
[optimizer]
use = "adamw"
lr = 1e-2
[schedule]
warmup_steps = 2
[tokenizer]
use = "{tokenizer}"
[train]
batch_size = 2
seq_len = 16
steps = 4
[evaluate]
tokens = 64
batch_size = 2
[checkpoint]
every = 2
[sample]
prompt = "sense and"
tokens = 40
temperature = 1.3
top_p = 0.9
"""
)
TEXT = "sense and"
PROMPT = ["--prompt", TEXT]
Write = Callable[..., tuple[int, str, str]]


class Trained:
    """A finished run, and the texts and cache that it used."""

    def __init__(self, root: Path, tokenizer: str) -> None:
        self.run, self.corpus, self.cache = root / "run", root / "corpus", root / "cache"
        self.corpus.mkdir(parents=True)
        for i in range(12):
            self.corpus.joinpath(f"{i}.txt").write_text(
                " ".join(f"sense {i} and sensibility {i * j}" for j in range(60))
            )
        recipe = root / "nano.toml"
        recipe.write_text(
            RECIPE.format(corpus=self.corpus, tokenizer=tokenizer).replace(
                '"bpe"', '"bpe"\nvocab_size = 300'
            )
        )
        done = run("lswt_core.run", recipe, "--out", self.run, cwd=root, LSWT_CACHE_DIR=self.cache)
        assert done.returncode == 0, done.stdout + done.stderr

    def environment(self) -> dict[str, str]:
        return environment(LSWT_CACHE_DIR=self.cache)

    def copy(self, root: Path) -> Path:
        return shutil.copytree(self.run, root / "run")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("bpe"), "bpe")


@pytest.fixture
def write(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Write:
    """Call the command: exit code, standard output, standard error."""
    monkeypatch.setenv("LSWT_CACHE_DIR", str(trained.cache))

    def call(*words: object) -> tuple[int, str, str]:
        code = main(["generate", *map(str, words)])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return call


def words_of(run: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "lswt_core", "generate", str(run), *PROMPT, *more]


def test_it_writes_what_the_run_wrote(trained: Trained, write: Write) -> None:
    # a carriage return stays one
    _, sample = trained.run.joinpath("sample.txt").read_bytes().decode().split("⟦model⟧")
    assert write(trained.run, *PROMPT, "--tokens", 40, "--temperature", 1.3, "--top-p", 0.9) == (
        0,
        TEXT + sample,
        "",
    )
    assert (
        write(
            trained.run, *PROMPT, "--tokens", 40, "--temperature", 1.3, "--top-p", 0.9, "--seed", 1
        )[1]
        != TEXT + sample
    )


def test_the_weights_are_the_newest_checkpoints(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LSWT_CACHE_DIR", str(trained.cache))
    opened = load_run(trained.run, Registry())
    saved = load_file(trained.run / "checkpoints" / "step-00000004" / "model.safetensors")
    held = opened.model.decoder.state_dict()
    assert {f"decoder.{name}" for name in held} == saved.keys()
    assert all(tensor.equal(saved[f"decoder.{name}"]) for name, tensor in held.items())
    assert opened.model.seq_len == 16
    assert opened.step == 4
    assert opened.recipe.train.batch_size == 2
    assert not opened.model.decoder.training


@pytest.mark.parametrize("method", ["sample", "greedy", "contrastive"])
def test_every_method_writes_the_same_again(trained: Trained, write: Write, method: str) -> None:
    code, printed, _ = write(trained.run, *PROMPT, "--decode", method, "--tokens", 30, "--json")
    report = json.loads(printed)
    assert code == 0 and report["decode"] == method and report["prompt"] == TEXT
    assert len(report["ids"]) == 30 and not report["ended"]
    assert write(trained.run, *PROMPT, "--decode", method, "--tokens", 30) == (
        0,
        TEXT + report["text"] + "\n",
        "",
    )


def test_without_a_penalty_contrastive_search_is_greedy(trained: Trained, write: Write) -> None:
    texts = [
        write(trained.run, *PROMPT, "--tokens", 40, "--decode", *more)[1]
        for more in (
            ["greedy"],
            ["contrastive", "--alpha", "0"],
            ["contrastive", "--top-k", "1"],
            ["contrastive", "--alpha", "0.9"],
        )
    ]
    assert texts[0] == texts[1] == texts[2] != texts[3]


@pytest.mark.slow
def test_a_prompt_may_come_from_standard_input(trained: Trained, write: Write) -> None:
    words = [
        sys.executable,
        "-m",
        "lswt_core",
        "generate",
        str(trained.run),
        "--prompt",
        "-",
        "--tokens",
        "9",
    ]
    piped = subprocess.run(
        words, input=TEXT.encode(), env=trained.environment(), capture_output=True
    )
    assert piped.returncode == 0, piped.stderr
    assert piped.stdout.decode() == write(trained.run, *PROMPT, "--tokens", 9)[1]
    foreign = subprocess.run(
        words, input="naïve".encode("latin-1"), env=trained.environment(), capture_output=True
    )
    assert foreign.returncode == 2
    assert b"UTF-8" in foreign.stderr
    assert b"Traceback" not in foreign.stderr


@pytest.mark.slow
def test_it_begins_at_once(trained: Trained) -> None:
    # seconds to import, and of no use here
    slow = {"torch._dynamo", "torch._inductor", "transformers", "datasets", "matplotlib"}
    script = (
        f"import sys; from lswt_core.__main__ import main; main(sys.argv[1:]); print(sorted({slow}"
        " & set(sys.modules)))"
    )
    words = [sys.executable, "-c", script, "generate", str(trained.run), *PROMPT, "--tokens", "3"]
    done = subprocess.run(words, env=trained.environment(), capture_output=True, text=True)
    assert done.stdout.endswith("[]\n"), done.stdout + done.stderr


def endless(trained: Trained) -> list[str]:
    """A text that goes on until it is stopped; a drawn one might come to its end."""
    return words_of(trained.run, "--tokens", "100000000", "--decode", "greedy")


@pytest.mark.slow
def test_text_appears_while_it_is_written_and_ctrl_c_ends_it(trained: Trained) -> None:
    with subprocess.Popen(
        words_of(trained.run, "--tokens", "100000000", "--decode", "greedy"),
        env=trained.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert len(process.stdout.read(20)) == 20
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert rest.endswith(b"\n") and errors == b"interrupted\n"


@pytest.mark.slow
def test_a_reader_that_leaves_ends_it_quietly(trained: Trained) -> None:
    with subprocess.Popen(
        words_of(trained.run, "--tokens", "100000000", "--decode", "greedy"),
        env=trained.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(5)
        process.stdout.close()
        output = process.stderr.read()
    assert (process.returncode, output) == (141, b"")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--decode", "contrastiv"], "did you mean 'contrastive'"),
        (["--decode", "contrastive", "--alpha", "1.5"], "alpha = 1.5"),
        (["--decode", "contrastive", "--top-k", "0"], "top_k = 0"),
        (["--decode", "greedy", "--temperature", "1"], "'greedy' has no temperature"),
        (["--tokens", "0"], "tokens = 0"),
        (["--prompt", "\udcff"], "not UTF-8"),
    ],
)
def test_what_cannot_be_done_is_refused(
    trained: Trained, write: Write, words: list[str], named: str
) -> None:
    code, printed, error = write(trained.run, *PROMPT, *words)
    assert (code, printed) == (2, "") and named in error


def test_a_directory_without_a_model_is_refused(
    trained: Trained, write: Write, tmp_path: Path
) -> None:
    for name in ("empty", "foreign", "young/checkpoints"):
        tmp_path.joinpath(name).mkdir(parents=True)
    tmp_path.joinpath("foreign", "config.json").write_text("{}")
    reasons = {
        "nowhere": "no such directory",
        "empty": "is empty",
        "foreign": "no model that can be loaded",
        "young": "no checkpoint yet",
    }
    for name, named in (reasons | {"foreign/config.json": "is a file"}).items():
        code, printed, error = write(tmp_path / name, *PROMPT)
        assert (code, printed) == (5, "") and named in error and str(tmp_path / name) in error


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    trained: Trained,
    write: Write,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = trained.copy(tmp_path)
    earlier, later = sorted(run.joinpath("checkpoints").iterdir())
    later.joinpath("model.safetensors").write_bytes(b"")
    assert write(run, *PROMPT, "--tokens", 3)[0] == 0
    assert "step-00000004" in caplog.text and "damaged" in caplog.text
    earlier.joinpath("MANIFEST.json").unlink()
    code, _, error = write(run, *PROMPT)
    assert code == 5 and "intact" in error


@pytest.mark.slow
def test_training_text_is_read_only_to_train_a_lost_tokenizer_again(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Trained(tmp_path, "bpe")
    monkeypatch.setenv("LSWT_CACHE_DIR", str(own.cache))
    _, expected, _ = write(own.run, *PROMPT)
    shutil.rmtree(own.cache)
    assert write(own.run, *PROMPT) == (0, expected, "")  # trained again on the same text
    shutil.move(own.corpus, tmp_path / "away")
    assert write(own.run, *PROMPT) == (0, expected, "")  # from the cache
    shutil.rmtree(own.cache)
    code, _, error = write(own.run, *PROMPT)
    assert code == 4 and str(own.corpus) in error
    shutil.move(tmp_path / "away", own.corpus)
    own.corpus.joinpath("3.txt").write_text("another text")
    code, _, error = write(own.run, *PROMPT)
    assert code == 5 and "fingerprint" in error
    # and no wrong tokenizer is kept under the right one's name
    assert not list(own.cache.glob("bpe-*"))


def test_a_tokenizer_that_learns_nothing_needs_no_training_text(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Trained(tmp_path, "bytes")
    shutil.rmtree(own.corpus)
    shutil.rmtree(own.cache)
    monkeypatch.setenv("LSWT_CACHE_DIR", str(own.cache))
    code, printed, error = write(own.run, *PROMPT, "--tokens", 5, "--decode", "contrastive")
    assert (code, error) == (0, "") and printed
    assert not own.cache.exists()
