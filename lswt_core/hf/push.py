"""An exported directory sent to the HuggingFace Hub."""

from __future__ import annotations

from pathlib import Path

from lswt_core.errors import DataError
from lswt_core.plugin_api.hub import access, cause
from lswt_core.reporting.units import format_bytes


def push(directory: Path, name: str, *, private: bool = False) -> str:
    """Upload a directory as the model ``name`` ("owner/model"), which is made if it does not exist;
    returns its address. The key is HF_API_KEY's or the one HuggingFace's own login has left.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=access()["token"])
    try:
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name, folder_path=directory, commit_message="Upload of an lswt-core model"
        )
    except Exception as error:  # the library's own and its network client's have no common base
        raise DataError(
            f"{directory} could not be pushed to {name!r}: {cause(error)}\n  fix: check the name"
            " and the network, and set HF_API_KEY to a key that may write (or: hf auth login);"
            " what was exported is complete and can be pushed again"
        ) from error
    return f"{api.endpoint}/{name}"


def listing(directory: Path) -> list[str]:
    """What a push would upload, a line each."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return [
        f"  {path.relative_to(directory)!s:<32}{format_bytes(path.stat().st_size):>12}"
        for path in files
    ]
