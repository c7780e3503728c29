"""The index of a directory of token files, index.json: what they were made from, their sizes and
hashes. It is written last: a directory without one is not complete.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import numpy as np

from lswt_core.data.token_cache import ids_dtype
from lswt_core.data.token_file import (
    Tokens,
    checksum,
    explained_io_errors,
    read_unchecked_header,
)
from lswt_core.data.token_parts import SPLITS, PartedText, SplitParts
from lswt_core.data.unigram import count_labels
from lswt_core.errors import DataError
from lswt_core.interfaces import Tokenizer
from lswt_core.plugin_api.atomic_write import OTHER_DIRECTORY, write_atomically
from lswt_core.recipe import Chosen

VERSION = 1
INDEX, LABEL_COUNTS = "index.json", "label-counts.bin"
AGAIN = "run the same tokenize command again"


def describe_text(text: PartedText, made_by: Sequence[Chosen], fingerprint: str) -> dict[str, Any]:
    """What token files were made from: the recipe's tables of source and tokenizer, and
    fingerprints; ``fingerprint`` is the source's.
    """
    (data, chosen), tokenizer = made_by, text.tokenizer
    return {
        "version": VERSION,
        "data": {"table": data.as_table(), "fingerprint": fingerprint},
        "tokenizer": {
            "table": chosen.as_table(),
            "fingerprint": tokenizer.fingerprint(),
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
        },
        "fingerprints": dict(text.fingerprints),
        "dtype": ids_dtype(tokenizer, text.source).str,
    }


def write_index(text: PartedText, parts: Sequence[SplitParts], made_of: dict[str, Any]) -> None:
    """Read and hash the complete parts of both splits, and write the index. Raises DataError if a
    part is damaged. Whoever writes it writes the same.
    """
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        splits, counts = {}, []
        for one in parts:
            paths = [text.path(one.split, number) for number in range(one.count or 0)]
            entries, total = [], np.zeros(text.tokenizer.vocab_size, dtype=np.int64)
            for entry, in_file in threads.map(
                partial(describe_file, tokenizer=text.tokenizer), paths
            ):
                entries.append(entry)
                total += in_file
            counts.append(total)
            splits[one.split] = summarise_split(entries)
    encoded = np.stack(counts).astype("<i8").tobytes()  # [splits, V], in the order of SPLITS
    write_atomically(text.directory / LABEL_COUNTS, encoded)
    index = {
        **made_of,
        "splits": splits,
        "label_counts": {"name": LABEL_COUNTS, **size_and_hash(encoded)},
    }
    content = json.dumps({**index, "sha256": hash_of(index)}, indent=1) + "\n"
    write_atomically(text.directory / INDEX, content.encode())


def describe_file(path: Path, tokenizer: Tokenizer) -> tuple[dict[str, Any], np.ndarray]:
    """A token file's entry in the index, and how often each id is a label in it [V]. Raises
    DataError if its content is damaged.
    """
    with explained_io_errors(path, advice=OTHER_DIRECTORY), path.open("rb") as file:
        header, body = read_unchecked_header(file)
        if checksum(file, body) != header["crc"]:
            raise DataError(f"{path} has damaged content: remove it, and {AGAIN}")
        file.seek(0)
        digest = file_digest(file, "sha256")
        entry = {"name": path.name, "size": file.tell(), "sha256": digest.hexdigest()}
    entry |= {key: header[key] for key in ("tokens", "documents", "n_bytes", "n_empty", "names")}
    ids = map_ids(path, header["dtype"], header["tokens"])
    starts = read_starts(path, ids.nbytes, header["documents"])
    tokens = Tokens(ids, starts, 0, 0, [], "")
    return entry, count_labels(tokens, tokenizer.eos_id, tokenizer.vocab_size)


def summarise_split(files: list[dict[str, Any]]) -> dict[str, Any]:
    """A split's entry in the index."""
    totals = {key: sum(one[key] for one in files) for key in ("tokens", "documents", "n_bytes")}
    return {**totals, "n_empty": sum(one["n_empty"] for one in files), "files": files}


def read_index(directory: Path) -> dict[str, Any]:
    """The index of a directory that is complete. Raises DataError if it is missing, damaged, or of
    another version of the format.
    """
    path = directory / INDEX
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        stated = index.pop("sha256")
    except FileNotFoundError:
        raise DataError(explain_missing_index(directory)) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{path} is damaged: remove it, and {AGAIN}") from error
    if index.get("version") != VERSION:
        raise DataError(
            f"{path} has version {index.get('version')} of the format, this is {VERSION}: tokenise"
            " the text again, into another directory"
        )
    if stated != hash_of(index):
        raise DataError(f"{path} was changed after it was written: remove it, and {AGAIN}")
    return index


def explain_missing_index(directory: Path) -> str:
    """Why a directory has no index, and what to do."""
    make = f"python -m lswt_core tokenize RECIPE --out {directory}"
    if not directory.is_dir():
        return (
            f"there is no directory of token files {directory} (relative to {Path.cwd()}): correct"
            f" data.token_directory, or make it with {make}"
        )
    files = [path for split in SPLITS for path in directory.glob(f"{split}-*.bin")]
    if not files:
        return f"{directory} holds no token files: correct data.token_directory, or {make}"
    return (
        f"{directory} is not complete: it has {len(files)} token files and no {INDEX}, which is"
        f" written last\n  fix: {AGAIN} ({make}), once for each part that was begun"
    )


def check_sizes(directory: Path, index: Mapping[str, Any]) -> None:
    """Raise DataError if a file of the index is missing or has another size."""
    wrong = []
    for entry in every_file(index):
        path = directory / entry["name"]
        size = path.stat().st_size if path.is_file() else None
        if size != entry["size"]:
            state = "is missing" if size is None else f"has {size:,} bytes, not {entry['size']:,}"
            wrong.append(f"{entry['name']} {state}")
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise DataError(
            f"{directory} is not complete: {'; '.join(wrong[:3])}{more}: copy it again, or {AGAIN}"
        )


def check_contents(directory: Path, index: Mapping[str, Any], share: slice) -> None:
    """Raise DataError if a file has another hash than in the index; of all files, those of
    ``share``.
    """
    for entry in every_file(index)[share]:
        path = directory / entry["name"]
        with explained_io_errors(path, advice=OTHER_DIRECTORY), path.open("rb") as file:
            digest = file_digest(file, "sha256")
        if digest.hexdigest() != entry["sha256"]:
            raise DataError(
                f"{path} is damaged: its sha256 is not the index's; copy it again, or remove it and"
                f" {AGAIN}"
            )


def every_file(index: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of all files."""
    return [
        *(entry for split in SPLITS for entry in index["splits"][split]["files"]),
        index["label_counts"],
    ]


def map_ids(path: Path, dtype: str, count: int) -> np.ndarray:
    """The ids of a token file [count], memory-mapped."""
    if not count:  # which cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r", shape=(count,))


def read_starts(path: Path, offset: int, count: int) -> np.ndarray:
    """Where documents begin in a token file [count]; ``offset`` are the bytes of its ids."""
    return np.fromfile(path, "<i8", count, offset=offset)


def size_and_hash(content: bytes) -> dict[str, Any]:
    """Size and sha256 of a file's content."""
    return {"size": len(content), "sha256": sha256(content).hexdigest()}


def hash_of(index: Mapping[str, Any]) -> str:
    """The sha256 of JSON data."""
    return sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()
