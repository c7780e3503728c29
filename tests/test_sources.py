"""The data sources: what each reads, in which order, what it holds out, and what it says when it
cannot.
"""

import gzip
import json
import re
import sys
import sysconfig
from pathlib import Path

import pytest
from lswt_hf import HuggingFaceData
from lswt_python import SitePackages, StandardLibrary
from lswt_records import JsonLines, Parquet
from lswt_text import Text

from lswt_core.errors import DataError
from lswt_core.interfaces import DataSource


def texts(source: DataSource, split: str) -> list[str]:
    return [document.text for document in source.documents(split)]


def ids(source: DataSource, split: str) -> list[str]:
    return [document.id for document in source.documents(split)]


def tree(root: Path, files: dict[str, str | bytes]) -> Path:
    """Write some files below a directory."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def jsonl(path: Path, records: list[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# ---------- python


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that stands in for the standard library and for what is installed."""
    many = {f"package/module_{number}.py": f"value = {number}\n" for number in range(200)}
    others = {
        "latin.py": "# -*- coding: latin-1 -*-\nname = 'é'\n".encode("latin-1"),
        "empty.py": "",
        "notes.txt": "no",
    }
    skipped = {
        f"{name}/x.py": "no"
        for name in (
            "test",
            "a/tests",
            "idlelib",
            "lib2to3/fix",
            "site-packages/p",
            "a/__pycache__",
        )
    }
    tree(tmp_path, {**many, **others, **skipped, "test.py": "yes"})
    monkeypatch.setattr(
        sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path), "purelib": str(tmp_path)}
    )
    return tmp_path


@pytest.mark.parametrize("kind", [StandardLibrary, SitePackages])
def test_python_files_are_split_by_path(installed: Path, kind: type[DataSource]) -> None:
    train, valid = ids(kind(), "train"), ids(kind(), "valid")
    assert train == sorted(train) and valid == sorted(valid) and not set(train) & set(valid)
    assert sorted(train + valid) == sorted(
        ["latin.py", "empty.py", "test.py", *(f"package/module_{n}.py" for n in range(200))]
    )
    assert 1 <= len(valid) <= 20  # 6.3 are expected
    assert "# -*- coding: latin-1 -*-\nname = 'é'\n" in texts(kind(), "train") + texts(
        kind(), "valid"
    )


@pytest.mark.parametrize("kind", [StandardLibrary, SitePackages])
def test_python_files_tell_their_size_before_they_are_read(
    installed: Path, kind: type[DataSource]
) -> None:
    for split in ("train", "valid"):
        size = sum(len(document.text.encode()) for document in kind().documents(split))
        assert size > 0 and kind().n_bytes(split) == pytest.approx(size, rel=0.05)


def test_the_split_of_a_file_does_not_depend_on_the_others(installed: Path) -> None:
    valid = ids(StandardLibrary(), "valid")
    for number in range(0, 200, 2):
        (installed / f"package/module_{number}.py").unlink()
    assert ids(StandardLibrary(), "valid") == [
        name for name in valid if (installed / name).exists()
    ]


def test_a_python_file_in_no_encoding_is_an_error(installed: Path) -> None:
    (installed / "package/bad.py").write_bytes(b"x = '\xff'\n")
    with pytest.raises(DataError, match=r"package/bad\.py.*encoding"):
        texts(StandardLibrary(), "train") + texts(StandardLibrary(), "valid")


def test_the_real_standard_library_is_there() -> None:
    assert len(StandardLibrary().fingerprint()) == 32
    names = ids(StandardLibrary(), "valid")
    assert 5 < len(names) < 60 and all(name.endswith(".py") for name in names)


# ---------- text


def test_text_takes_files_directories_and_patterns(tmp_path: Path) -> None:
    tree(
        tmp_path,
        {
            "one.txt": "1",
            "d/two.txt": "2",
            "d/e/three.md": "3",
            "d/.hidden": "no",
            "g/four.txt": "4",
            "g/x.bin": b"\xff",
        },
    )
    paths = [
        str(tmp_path / "one.txt"),
        str(tmp_path / "d"),
        str(tmp_path / "g/*.txt"),
        str(tmp_path / "d/two.txt"),
    ]
    source = Text(paths=paths, valid=[str(tmp_path / "d/e/three.md")])
    assert texts(source, "train") == ["1", "2", "4"]
    assert ids(source, "train") == [
        "one.txt",
        "two.txt",
        "four.txt",
    ]
    assert texts(source, "valid") == ["3"]


def test_paths_are_relative_to_the_directory_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree(tmp_path, {"a/x.txt": "1", "b/y.txt": "2"}))
    assert ids(Text(paths=["*/*.txt"], valid=["b"]), "train") == ["a/x.txt"]


def test_many_files_are_split_by_path_wherever_they_lie(tmp_path: Path) -> None:
    files = {f"{number}.txt": f"text {number}" for number in range(100)}
    here, there = (
        Text(paths=[str(tree(tmp_path / name, files))], valid_share=0.1)
        for name in ("here", "there")
    )
    train, valid = texts(here, "train"), texts(here, "valid")
    assert 2 <= len(valid) <= 25 and sorted(train + valid) == sorted(files.values())
    assert valid == texts(there, "valid") and here.fingerprint() == there.fingerprint()


@pytest.mark.parametrize("names", [["only.txt"], ["a.txt", "b.txt"]])
def test_too_few_files_to_split_hold_out_their_ends(tmp_path: Path, names: list[str]) -> None:
    text = "".join(f"line {number:03}\n" for number in range(100))  # 900 characters
    source = Text(paths=[str(tree(tmp_path, dict.fromkeys(names, text)))], valid_share=0.1)
    train, valid = texts(source, "train"), texts(source, "valid")
    assert len(train) == len(valid) == len(names)
    assert all(
        first + last == text and last.startswith("line 09") and len(last) == 90
        for first, last in zip(train, valid, strict=True)
    )


@pytest.mark.parametrize("files", [1, 60])
def test_text_tells_its_size_before_it_is_read(tmp_path: Path, files: int) -> None:
    source = Text(
        paths=[str(tree(tmp_path, {f"{n}.txt": "né wörd\n" * (100 + n) for n in range(files)}))],
        valid_share=0.1,
    )
    for split in ("train", "valid"):
        size = sum(len(document.text.encode()) for document in source.documents(split))
        assert size > 0
        assert source.n_bytes(split) == pytest.approx(size, rel=1e-9 if files > 1 else 0.2)


def test_text_without_lines_is_cut_anywhere(tmp_path: Path) -> None:
    source = Text(paths=[str(tree(tmp_path, {"x.txt": "x" * 100}))], valid_share=0.25)
    assert [len(texts(source, split)[0]) for split in ("train", "valid")] == [75, 25]


def test_text_that_is_not_utf8_is_an_error_with_its_place(tmp_path: Path) -> None:
    source = Text(paths=[str(tree(tmp_path, {"bad.txt": "né".encode() + b"\xff."}))])
    with pytest.raises(DataError, match=r"bad\.txt: byte 3 \(0xff\)"):
        texts(source, "train")


@pytest.mark.parametrize("kind", [Text, JsonLines, Parquet])
@pytest.mark.parametrize("path", ["nowhere", "no*", "hollow"])
def test_a_path_that_names_nothing_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type, path: str
) -> None:
    (tmp_path / "hollow").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"'{re.escape(path)}' .*data.paths"):
        texts(kind(paths=[path]), "train")


# ---------- jsonl, parquet


def write_parquet(path: Path, columns: dict[str, list]) -> Path:
    from pyarrow import parquet, table

    parquet.write_table(table(columns), path)
    return path


@pytest.mark.parametrize("kind", [JsonLines, Parquet])
def test_records_are_split_by_number(tmp_path: Path, kind: type) -> None:
    values = [f"text {number}" for number in range(10)]
    for name, part in (("a", values[:7]), ("b", values[7:])):
        if kind is JsonLines:
            jsonl(tmp_path / f"{name}.jsonl", [{"text": text} for text in part])
        else:
            write_parquet(tmp_path / f"{name}.parquet", {"text": part})
    source = kind(paths=[str(tmp_path)], valid_share=0.25)
    assert texts(source, "valid") == [values[0], values[4], values[8]]
    assert texts(source, "train") == [text for number, text in enumerate(values) if number % 4]
    chosen = kind(paths=[str(tmp_path)], valid=[str(tmp_path / "b.*")])
    assert texts(chosen, "train") == values[:7] and texts(chosen, "valid") == values[7:]
    assert source.fingerprint() != chosen.fingerprint()


def test_jsonl_plain_and_gzipped_are_alike(tmp_path: Path) -> None:
    plain = jsonl(tmp_path / "x.jsonl", [{"body": "é\n"}, {"body": ""}, {"body": "\ud83d\ude00"}])
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes() + b"\n  \n"))
    for name in ("x.jsonl", "y.jsonl.gz"):
        source = JsonLines(paths=[str(tmp_path / name)], field="body", valid_share=0.5)
        assert texts(source, "train") == [""] and texts(source, "valid") == ["é\n", "😀"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "a"', r"x\.jsonl:2: .* column 13"),
        (b'{"text": "\xff"}', r"x\.jsonl:2: byte 10 "),
        (
            b'{"texts": "a", "id": 3}',
            r"x\.jsonl:2: .*'text' .*'texts', 'id'.*data\.field.*'texts'",
        ),
        (b"{}", r"x\.jsonl:2: .*'text' .*none"),
        (b'["a"]', r"x\.jsonl:2: .*list"),
        (b'{"text": null}', r"x\.jsonl:2: .*'text' .*null"),
        (b'{"text": "\\ud800"}', r"x\.jsonl:2: .*surrogate"),
        (b"[" * 100_000, r"x\.jsonl:2: .*nested"),
    ],
)
def test_a_bad_line_is_an_error_with_its_place(tmp_path: Path, line: bytes, said: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError, match=said):
        texts(JsonLines(paths=[str(tmp_path)]), "train")


def test_a_cut_gzip_file_is_an_error(tmp_path: Path) -> None:
    whole = gzip.compress(
        "".join(json.dumps({"text": str(number**9)}) + "\n" for number in range(500)).encode()
    )
    (tmp_path / "x.jsonl.gz").write_bytes(whole[:-100])
    with pytest.raises(DataError, match=r"x\.jsonl\.gz:\d+: "):
        texts(JsonLines(paths=[str(tmp_path)]), "train")


def test_parquet_errors(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", {"texts": ["a", None], "id": [1, 2]})
    with pytest.raises(
        DataError,
        match=r"x\.parquet: .*'text' .*'texts', 'id'.*data\.column .*'texts'",
    ):
        texts(Parquet(paths=[str(path)]), "train")
    with pytest.raises(DataError, match=r"x\.parquet:1: .*'texts' .*None"):
        texts(Parquet(paths=[str(path)], column="texts"), "train")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"x\.parquet: "):
        texts(Parquet(paths=[str(path)]), "train")


# ---------- fingerprints


@pytest.mark.parametrize("kind", [Text, JsonLines, Parquet])
def test_fingerprints_follow_the_content(tmp_path: Path, kind: type) -> None:
    def made(directory: str, words: list[str]) -> str:
        (tmp_path / directory).mkdir(exist_ok=True)
        for number, word in enumerate(words):
            path = tmp_path / directory / f"{number}.{'parquet' if kind is Parquet else 'jsonl'}"
            if kind is Parquet:
                write_parquet(path, {"text": [word]})
            else:
                jsonl(path, [{"text": word}])
        return kind(paths=[str(tmp_path / directory)]).fingerprint()

    first = made("first", ["a", "b"])
    assert first == made("copy", ["a", "b"])
    assert first == kind(paths=[str(tmp_path / "first")]).fingerprint()
    others = [
        made("other", ["a", "c"]),
        made("more", ["a", "b", "c"]),
        kind(paths=[str(tmp_path / "first")], valid_share=0.5).fingerprint(),
    ]
    assert len({first, *others}) == 4


def test_the_fingerprint_of_python_files_follows_names_and_content(installed: Path) -> None:
    fingerprints = {StandardLibrary().fingerprint()}
    (installed / "notes.txt").write_text("not part of it")
    assert StandardLibrary().fingerprint() in fingerprints
    (installed / "package/module_7.py").write_text("value = 8\n")
    fingerprints.add(StandardLibrary().fingerprint())
    (installed / "empty.py").rename(installed / "void.py")
    fingerprints.add(StandardLibrary().fingerprint())
    assert len(fingerprints) == 3


# ---------- hugging face


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a network, and a directory for what the libraries keep."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_API_KEY", "hf_secret")
    data = tmp_path / "data"
    data.mkdir()
    jsonl(data / "train.jsonl", [{"text": f"text {number}", "id": number} for number in range(100)])
    jsonl(data / "test.jsonl", [{"text": "held", "id": 0}])
    return data


def test_sizes_are_of_the_split(tmp_path: Path) -> None:
    for name in ("a", "b"):
        jsonl(tmp_path / f"{name}.jsonl", [{"text": "x" * 90} for _ in range(100)])
    size = (tmp_path / "a.jsonl").stat().st_size
    every = JsonLines(paths=[str(tmp_path)], valid_share=0.25)
    assert every.n_bytes("train") == round(2 * size * 0.75)
    assert every.n_bytes("valid") == round(2 * size * 0.25)
    listed = JsonLines(paths=[str(tmp_path)], valid=[str(tmp_path / "b.jsonl")])
    assert listed.n_bytes("train") == listed.n_bytes("valid") == size
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write("")
    assert JsonLines(paths=[str(tmp_path)]).n_bytes("train") is None


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_a_local_data_set(hub: Path, streaming: bool) -> None:
    every = [f"text {number}" for number in range(100)]
    source = HuggingFaceData(path=str(hub), streaming=streaming, valid_documents=3)
    train, valid = texts(source, "train"), texts(source, "valid")
    assert sorted(train + valid) == sorted(every) and valid and source.streaming == streaming
    if streaming:
        assert valid == every[:3]
    named = HuggingFaceData(path=str(hub), valid_split="test", streaming=streaming)
    assert texts(named, "train") == every and texts(named, "valid") == ["held"]
    assert source.fingerprint() != named.fingerprint()
    assert source.fingerprint() == source.fingerprint()
    options = {"streaming": streaming, "valid_documents": 3}
    with pytest.raises(DataError, match=r"'texts' .*data\.column .*'text'"):
        texts(HuggingFaceData(path=str(hub), column="texts", **options), "train")
    with pytest.raises(DataError, match=r"'id' .*int"):
        texts(HuggingFaceData(path=str(hub), column="id", **options), "train")
    with pytest.raises(DataError, match="'nope'"):
        texts(HuggingFaceData(path=str(hub), train_split="nope", **options), "train")
    assert source.state() is not None
    rows = source.documents("train")
    read = [next(rows) for _ in range(40)]
    state = json.loads(json.dumps(source.state()))
    again = HuggingFaceData(path=str(hub), streaming=streaming, valid_documents=3)
    after = [one.text for one in again.documents("train", after=state)]
    assert after == train[40:] and [one.text for one in read] == train[:40]
    kept = [path for path in (hub.parent / "cache").rglob("*") if path.is_file()]
    assert (bool(kept) or streaming) and not any(b"hf_secret" in path.read_bytes() for path in kept)


@pytest.mark.slow
@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_out_of_reach_says_the_ways_out(streaming: bool) -> None:
    with pytest.raises(DataError) as caught:
        texts(
            HuggingFaceData(path="someone/something", subset="small", streaming=streaming), "train"
        )
    message = str(caught.value)
    for part in (
        "'someone/something' (small)",
        "local directory",
        "data.use=text",
        "data.use=stdlib",
    ):
        assert part in message
    assert len(message.splitlines()) == 2 and "hf_secret" not in message


@pytest.mark.slow
def test_importing_the_plugin_imports_neither_library() -> None:
    import subprocess

    code = (
        "import lswt_hf, sys; lswt_hf.lswt_components(); print([m for m in ('datasets',"
        " 'transformers') if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert run.stdout.strip() == "[]", run.stderr
