"""Upload an exported directory to the HuggingFace Hub."""

from __future__ import annotations

from pathlib import Path

from lswt_core.errors import DataError
from lswt_core.plugin_api.hub import hub_options, summarise_error
from lswt_core.reporting.units import format_bytes


def push(directory: Path, name: str, *, private: bool = False) -> str:
    """Upload a directory as the model ``name`` ("owner/model"), created if it does not exist;
    return its URL. The access token is HF_API_KEY or that of ``hf auth login``.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=hub_options()["token"])
    try:
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name, folder_path=directory, commit_message="Upload of an lswt-core model"
        )
    except Exception as error:  # huggingface_hub and its HTTP client share no base class
        raise DataError(
            f"{directory} could not be pushed to {name!r}: {summarise_error(error)}\n"
            "  fix: check the name and the network, and set HF_API_KEY to a token with write access"
            " (or: hf auth login); the export itself is complete and can be pushed again"
        ) from error
    return f"{api.endpoint}/{name}"


def list_files(directory: Path) -> list[str]:
    """Return the files that a push would upload with their sizes, one line each."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return [
        f"  {path.relative_to(directory)!s:<32}{format_bytes(path.stat().st_size):>12}"
        for path in files
    ]
