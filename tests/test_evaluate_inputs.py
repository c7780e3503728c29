"""What ``evaluate`` reads of a text, and what it says of input that it cannot use."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_parts import EOS, SEQ_LEN, XL, evaluate, make_run, model_of, text_of
from lswt_bytes import Bytes
from lswt_recall.integers import Integers
from lswt_sinks import SoftmaxOffByOne
from lswt_xl_cache import SlidingWindow

from lswt_core.data import Tokens
from lswt_core.errors import DataError, UsageError
from lswt_core.evaluation.memory_gain import choose_lengths, memory_gain
from lswt_core.evaluation.memory_length import can_be_cut
from lswt_core.evaluation.narrow_states import narrow_errors
from lswt_core.evaluation.plain_data import describe_losses
from lswt_core.evaluation.recall import chance_level
from lswt_core.evaluation.register_gain import register_gain
from lswt_core.evaluation.texts import Limits, text_of_files, text_of_tokens
from lswt_core.evaluation.token_losses import TokenLosses, token_losses
from lswt_core.interfaces import IGNORE


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    return make_run(tmp_path_factory.mktemp("inputs"))


# ---------- which part of a text is read


def stored(*documents: np.ndarray) -> Tokens:
    """A text of documents as they are stored."""
    starts = np.cumsum([0, *map(len, documents)])[:-1]
    names = [str(number) for number in range(len(documents))]
    return Tokens(np.concatenate(documents), starts, 0, 0, names, "")


def answered(prompt: int, answer: int) -> np.ndarray:
    """A document whose first tokens are read and not predicted."""
    tokenizer = Bytes()
    return np.array([tokenizer.bos_id, *[~97] * prompt, *[98] * answer], np.int32)


def test_documents_of_which_a_part_is_predicted_are_read_whole() -> None:
    text = text_of_tokens("t", stored(answered(90, 3), answered(40, 2)), Bytes(), Limits(10**4, 16))
    assert sorted(map(len, text.documents)) == [43, 94]
    assert (text.tokens, text.n_bytes) == (7, 5), "each with the document's end, which has no byte"


def test_a_text_of_which_nothing_is_predicted_is_refused() -> None:
    unscored = np.array([~Bytes().bos_id, *[~97] * 9], np.int32)
    with pytest.raises(UsageError, match="none of the 10 tokens that are read of 't' is scored"):
        text_of_tokens("t", stored(unscored), Bytes(), Limits(100, 16))


def test_bits_are_per_byte_of_the_tokens_that_are_scored(tmp_path: Path) -> None:
    tmp_path.joinpath("mixed.txt").write_text("a" * 64 + "日本語" * 500)
    limits = Limits(65, 65)  # BOS and the 64 letters, of which the last predicts another byte
    text = text_of_files("t", tmp_path / "mixed.txt", Bytes(), limits)
    assert 64 <= text.n_bytes <= 67 and text.tokens == 65
    losses = TokenLosses(np.full(65, 2.0), np.zeros(65, int), np.arange(65))
    described = describe_losses(losses, text)
    assert described["bits_per_byte"] == pytest.approx(130 / np.log(2) / text.n_bytes)
    assert described["perplexity"] == pytest.approx(np.exp(2.0))
    assert describe_losses(losses, text._replace(n_bytes=0))["bits_per_byte"] is None


def test_a_segment_is_no_longer_than_the_longest_document() -> None:
    model, text = model_of(memories=XL), text_of(7, 21)
    whole = token_losses(model, text, 21)
    np.testing.assert_array_equal(token_losses(model, text, 10**9).nll, whole.nll)


# ---------- memories


def test_lengths_of_a_memory_need_all_states_to_be_memories_of_the_last_tokens() -> None:
    window = model_of(memories={"window": partial(SlidingWindow, length=6)})
    text = text_of(40)
    assert can_be_cut(model_of(memories=XL).decoder)
    assert not can_be_cut(window.decoder) and not can_be_cut(model_of(memories={}).decoder)
    assert choose_lengths(window, text, SEQ_LEN) == []
    with pytest.raises(UsageError, match="cannot be cut to a number of tokens"):
        memory_gain(window, text, SEQ_LEN, [3])
    assert [point.memory for point in memory_gain(window, text, SEQ_LEN, [])] == [0, None]


def test_narrow_caches_are_measured_where_there_is_a_memory() -> None:
    model, text = model_of(memories=XL), text_of(3 * SEQ_LEN, SEQ_LEN)
    full = token_losses(model, text, SEQ_LEN)
    for error in narrow_errors(model, text, SEQ_LEN, full):
        assert error.increase.tokens == 2 * SEQ_LEN
    with pytest.raises(UsageError, match="behind its document's first segment"):
        narrow_errors(model, text_of(SEQ_LEN), SEQ_LEN, full)


def test_other_keys_without_a_token_count_as_registers() -> None:
    model, text = model_of(memories={"off": SoftmaxOffByOne}), text_of(20)
    assert register_gain(model, text, token_losses(model, text, SEQ_LEN), SEQ_LEN).value != 0


# ---------- recall


def test_chance_is_estimated_without_bias() -> None:
    generator = np.random.default_rng(0)
    size, answers, found = 60, 600, []
    for _ in range(40):
        labels = generator.integers(2, 2 + size, (20, answers // 20))
        text = text_of(*[answers // 20] * 20)._replace(
            labels=[*labels], names=[f"distance 1/{number}" for number in range(20)]
        )
        found.append(chance_level(text))
    accuracies, losses = ([getattr(one, name) for one in found] for name in ("accuracy", "loss"))
    assert np.mean(accuracies) == pytest.approx(1 / size, abs=0.003)
    assert np.mean(losses) == pytest.approx(np.log(size), abs=0.005)


def test_chance_is_that_of_the_most_frequent_answer() -> None:
    labels = [np.array([7, 7, 7, EOS + 1]), np.array([7, 7, EOS + 1, IGNORE])]
    text = text_of(4, 4)._replace(labels=labels, names=["distance 1/a", "distance 2/b"])
    assert chance_level(text).accuracy == 5 / 7


def test_a_number_that_is_no_id_is_named() -> None:
    with pytest.raises(DataError, match="the number -4, and ids are from 0 to 63"):
        Integers(size=64).encode(["3 -4 2"])
    with pytest.raises(DataError, match="the number 64, and ids are from 0 to 63"):
        Integers(size=64).encode(["3 64 2"])


# ---------- the command


def test_a_text_may_have_an_equals_sign_in_its_name(
    run_directory: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath("a=b.txt").write_text("sense and sensibility")
    code, out, err = evaluate(capsys, run_directory, "--text", "a=b.txt", "--json")
    assert code == 0, err
    assert list(json.loads(out)["texts"]) == ["a=b.txt"]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--text", "x="], "a name or a path is missing"),
        (["--text", "=a.txt"], "a name or a path is missing"),
        (["--out", "a.txt"], "it is a file"),
        pytest.param(["--task", "nonsense"], "no such task", marks=pytest.mark.slow),
    ],
)
def test_it_is_refused_before_anything_is_measured(
    words: list[str],
    why: str,
    run_directory: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def measure(*_: Any) -> None:
        raise AssertionError("a text was measured")

    monkeypatch.setattr("lswt_core.evaluation.measure.evaluate_text", measure)
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath("a.txt").write_text("sense")
    code, _, err = evaluate(capsys, run_directory, *words)
    assert (code, why in err) == (2, True), err


def test_the_report_names_what_other_segments_are_for(
    run_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = evaluate(capsys, run_directory, "--tokens", 300, "--seq-len", 8)
    shown = " ".join(out.split())
    assert "Read in segments of 8 tokens (losses, memory, " in shown
    assert "the other measures in those of training, 16)" in shown
