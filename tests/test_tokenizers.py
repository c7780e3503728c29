"""The tokenizers: round trips, special ids, and what is learned once and kept."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_parts import Given
from hypothesis import given
from hypothesis import strategies as st
from lswt_bpe import BytePair
from lswt_bytes import Bytes
from lswt_hf import HuggingFaceTokenizer
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Rules

from lswt_core.data import tokenise
from lswt_core.errors import DataError, ResourceError
from lswt_core.interfaces import Document, Tokenizer
from lswt_core.plugin_api import tokenizers as fast

WORDS = [
    f"the {a} of {b} is not the {b} of {a}\n\tif x[{n}] == '{a}'"
    for n in range(30)
    for a in ("house", "ring")
    for b in ("bird", "sea")
]
STRANGE = [
    "",
    " ",
    "the house",
    "  two  spaces ",
    "\r\n\t",
    "né 漢字 😀",
    "\x00\x7f",
    "<|begin|> <|end|> </s>",
    "ring" * 50,
]


def corpus() -> list[Document]:
    return [Document(str(number), text) for number, text in enumerate(WORDS)]


def fitted(cache: Path, fingerprint: str = "corpus", **options: int) -> BytePair:
    tokenizer = BytePair(**{"vocab_size": 320, **options})
    tokenizer.fit(corpus, fingerprint, cache)
    return tokenizer


def check(tokenizer: Tokenizer) -> None:
    """What holds for every tokenizer."""
    encoded = tokenizer.encode(STRANGE)
    assert [tokenizer.decode(ids) for ids in encoded] == STRANGE
    used = {value for ids in encoded for value in ids}
    assert all(
        0 <= value < tokenizer.vocab_size for value in {*used, tokenizer.bos_id, tokenizer.eos_id}
    )
    assert not used & {tokenizer.bos_id, tokenizer.eos_id}  # not even where a text spells them
    assert tokenizer.decode([tokenizer.bos_id, *encoded[2], tokenizer.eos_id]) == STRANGE[2]
    assert tokenizer.encode([STRANGE[5]]) == [encoded[5]] and tokenizer.encode([]) == []
    listed = tokenizer.vocab()
    assert listed is None or sorted(listed.values()) == list(range(tokenizer.vocab_size))


def test_bytes() -> None:
    check(Bytes())
    assert Bytes().encode(["é!"]) == [[0xC3, 0xA9, 0x21]] and Bytes().vocab_size == 258
    assert Bytes().decode([0xC3, 0x21]) == "\ufffd!"


def test_bpe_round_trips_and_is_shorter_than_bytes(tmp_path: Path) -> None:
    tokenizer = fitted(tmp_path)
    check(tokenizer)
    assert 258 < tokenizer.vocab_size <= 320
    assert len(tokenizer.encode([WORDS[0]])[0]) < len(WORDS[0].encode()) / 2


def test_bpe_is_trained_once(tmp_path: Path) -> None:
    first = fitted(tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.suffix == ".json" and json.loads(path.read_text())["model"]["type"] == "BPE"
    again = BytePair(vocab_size=320)
    again.fit(lambda: pytest.fail("the text was read again"), "corpus", tmp_path)
    assert again.fingerprint() == first.fingerprint()
    assert again.encode(STRANGE) == first.encode(STRANGE)


@pytest.mark.parametrize(
    "change", [{"vocab_size": 300}, {"train_characters": 500}, {"fingerprint": "another"}]
)
def test_bpe_of_another_text_or_options_is_another_file(tmp_path: Path, change: dict) -> None:
    first, other = fitted(tmp_path), fitted(tmp_path, **change)
    assert len(list(tmp_path.iterdir())) == 2
    # that one learned from the same text
    assert (first.fingerprint() == other.fingerprint()) == ("fingerprint" in change)


def test_bpe_learns_from_the_first_characters_only(tmp_path: Path) -> None:
    def endless():
        while True:
            yield Document("x", "abab " * 10)

    tokenizer = BytePair(train_characters=1000)
    tokenizer.fit(endless, "endless", tmp_path)
    assert tokenizer.vocab_size > 258


@pytest.mark.parametrize("content", ["", "{", '{"version": "1.0"}', "[]"])
def test_a_damaged_bpe_file_is_made_again(tmp_path: Path, content: str) -> None:
    first = fitted(tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_text()
    path.write_text(content)
    assert fitted(tmp_path).fingerprint() == first.fingerprint() and path.read_text() == whole


def test_bpe_is_the_same_in_every_process(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from test_tokenizers import fitted;"
        " print(fitted(Path(sys.argv[1])).fingerprint())"
    )
    path = ":".join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "RAYON_NUM_THREADS": "5"}
    command = [sys.executable, "-c", code, str(tmp_path / "there")]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.strip() == fitted(tmp_path / "here").fingerprint()


def test_bpe_says_where_it_cannot_be_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match="LSWT_CACHE_DIR"):
        fitted(tmp_path / "file" / "cache")


@pytest.mark.slow
def test_hf_from_a_local_directory_and_what_it_says_when_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    import tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_API_KEY", "hf_secret")
    trained = fitted(tmp_path / "bpe")
    (file,) = (tmp_path / "bpe").iterdir()
    # OPT's two are one as well
    for name, specials in (
        ("whole", {"bos_token": "<|end|>", "eos_token": "<|end|>"}),
        ("bare", {}),
    ):
        rules = tokenizers.Tokenizer.from_file(str(file))
        PreTrainedTokenizerFast(
            tokenizer_object=rules, model_max_length=3, **specials
        ).save_pretrained(tmp_path / name)

    whole = HuggingFaceTokenizer(path=str(tmp_path / "whole"))
    check(whole)
    assert whole.encode(STRANGE) == trained.encode(STRANGE)
    assert whole.vocab_size == trained.vocab_size
    assert whole.bos_id == whole.eos_id == trained.eos_id
    whole.save(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")(STRANGE, add_special_tokens=False)[
        "input_ids"
    ] == whole.encode(STRANGE)
    assert (
        whole.fingerprint()
        == HuggingFaceTokenizer(path=str(tmp_path / "whole")).fingerprint()
        != trained.fingerprint()
    )
    bare = HuggingFaceTokenizer(path=str(tmp_path / "bare"))
    with pytest.raises(DataError, match="bos_token"):
        _ = bare.bos_id
    with pytest.raises(DataError, match="eos_token"):
        _ = bare.eos_id
    with pytest.raises(DataError) as caught:
        HuggingFaceTokenizer().encode(["x"])
    message = str(caught.value)
    for part in ("'facebook/opt-125m'", "tokenizer.path", "local directory", "tokenizer.use=bpe"):
        assert part in message
    assert len(message.splitlines()) == 2 and "hf_secret" not in message


@pytest.mark.parametrize("make", [lambda cache: Bytes(), fitted], ids=["bytes", "bpe"])
def test_transformers_reads_what_is_saved_as_the_same_mapping(
    make: Callable[[Path], Tokenizer], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    ours = make(tmp_path / "cache")
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        ours.bos_id,
        ours.eos_id,
        ours.eos_id,
    )
    for text, ids in zip(STRANGE, ours.encode(STRANGE), strict=True):
        # also where a text spells a special token
        assert theirs(text)["input_ids"] == [ours.bos_id, *ids]
        assert (
            theirs.decode(ids)
            == text
            == theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True)
        )
    assert theirs(STRANGE, add_special_tokens=False)["input_ids"] == ours.encode(STRANGE)
    ended = [ours.bos_id, *ours.encode(["a"])[0], ours.eos_id]
    assert theirs.decode(ended) == "<|begin|>a<|end|>"
    assert theirs.decode(ended, skip_special_tokens=True) == "a"
    assert set(theirs("a")) == {
        "input_ids",
        "attention_mask",
    }, "nothing that the model does not take"
    theirs.save_pretrained(tmp_path / "again")
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "again")(STRANGE)["input_ids"]
        == theirs(STRANGE)["input_ids"]
    )
    padded = theirs(["a", "longer"], padding=True)
    assert padded["input_ids"][0][0] == ours.eos_id, "padding stands on the left"
    assert padded["attention_mask"][0][0] == 0, "padding stands on the left"


def rules_of(
    *splits: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None = None
) -> Rules:
    """A tokenizer that splits in some way, and merges what it has learned from WORDS."""
    rules = Rules(models.BPE())
    rules.normalizer = normalizer
    if splits:
        rules.pre_tokenizer = pre_tokenizers.Sequence(list(splits))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rules.train_from_iterator(
        WORDS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return rules


byte_level = functools.partial(pre_tokenizers.ByteLevel, add_prefix_space=False)
BY_WORDS = Regex(
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITTINGS = {
    "gpt-2": lambda: rules_of(byte_level()),
    "llama-3": lambda: rules_of(
        pre_tokenizers.Split(BY_WORDS, "isolated"), byte_level(use_regex=False)
    ),
    "digits": lambda: rules_of(pre_tokenizers.Digits(individual_digits=True), byte_level()),
    "prefixed": lambda: rules_of(byte_level(add_prefix_space=True)),
    "metaspace": lambda: rules_of(pre_tokenizers.Metaspace()),
    "unsplit": lambda: rules_of(),
    "normalised": lambda: rules_of(byte_level(), normalizer=normalizers.Replace("\n", " ")),
}
CUT = ("gpt-2", "llama-3", "digits", "prefixed", "metaspace")


@pytest.mark.parametrize("name", SPLITTINGS)
@given(
    drawn=st.lists(
        st.sampled_from(
            ["\n", "\r\n", " ", "  ", "\t", "the", " house", "'s", ".", "12", "é", "漢", "\u0301"]
        ),
        min_size=20,
    )
)
def test_pieces_have_the_ids_of_the_whole(name: str, drawn: list[str]) -> None:
    rules, text = splitting(name), "".join(drawn)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fast, "CHUNK_CHARACTERS", 8)
        pieces = list(fast.split_long_text(rules, text))
    assert "".join(pieces) == text
    assert [i for piece in pieces for i in rules.encode(piece).ids] == rules.encode(text).ids


@functools.cache
def splitting(name: str) -> Rules:
    return SPLITTINGS[name]()


@pytest.mark.parametrize("name", SPLITTINGS)
@pytest.mark.parametrize(
    "line", ["the house\n", "    if x:\n\n\n\treturn the_house.\n", "The bird, the sea! "]
)
def test_a_long_text_is_many_pieces_where_words_are_parted(name: str, line: str) -> None:
    lengths = [
        len(piece) for piece in fast.split_long_text(splitting(name), line * (300_000 // len(line)))
    ]
    if name in CUT:
        assert len(lengths) > 16
        assert max(lengths[:-1]) < fast.CHUNK_CHARACTERS + 100
        assert lengths[-1] <= 2 * fast.CHUNK_CHARACTERS
    else:
        assert len(lengths) == 1


def test_bpe_learns_the_same_from_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned = []
    for size in (20, 1 << 20):
        monkeypatch.setattr(fast, "CHUNK_CHARACTERS", size)
        tokenizer = BytePair(vocab_size=320)
        tokenizer.fit(lambda: [Document("0", "\n\n".join(WORDS))], "whole", tmp_path / str(size))
        learned.append(tokenizer.fingerprint())
    assert learned[0] == learned[1]


@pytest.mark.parametrize(
    "token",
    [AddedToken("the sea"), AddedToken("<mask>", lstrip=True), AddedToken("<mask>", rstrip=True)],
)
def test_tokens_that_reach_for_spaces_leave_a_text_whole(token: AddedToken) -> None:
    rules = rules_of(byte_level())
    rules.add_tokens([token])
    assert len(list(fast.split_long_text(rules, "The bird, the sea " * 20_000))) == 1


def test_a_text_in_pieces_is_one_document(tmp_path: Path) -> None:
    texts = ["the house\n" * 40_000, "", "short", "é" * 200_000]
    for tokenizer in (Bytes(), fitted(tmp_path)):
        made = tokenise(Given(texts), tokenizer, "train", tmp_path)
        whole = [
            [tokenizer.bos_id, *ids] for ids in tokenizer.encode([text for text in texts if text])
        ]
        assert made.ids.tolist() == [i for ids in whole for i in ids]
        assert np.diff(made.document_starts, append=len(made.ids)).tolist() == [
            len(ids) for ids in whole
        ]
        assert made.n_bytes == sum(len(text.encode()) for text in texts) and made.n_empty == 1
