"""Download of a HuggingFace Hub model, as far as its embedding table needs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lswt_core.errors import DataError
from lswt_core.model.embedding_init.tensors import WEIGHTS, WEIGHTS_INDEX, explain_pickle
from lswt_core.plugin_api.hub import hub_options, summarise_error

# downloaded besides the weights
SMALL_FILES = ("config.json", WEIGHTS_INDEX, "tokenizer.json", "vocab.json", "added_tokens.json")
# pull requests of the Hub's safetensors conversion bot
CONVERTER, CONVERSION_TITLE = "SFconvertbot", "Adding `safetensors` variant of this model"


class HubSnapshot:
    """A partial download of a repository, "owner/name" or "owner/name@revision"."""

    def __init__(self, name: str, alternatives: str) -> None:
        """Download SMALL_FILES. Raises DataError, which ends in ``alternatives``, if that fails."""
        import huggingface_hub

        self.name, self.alternatives = name, alternatives
        self.repository, _, revision = name.partition("@")
        self.revision = revision or None
        self.directory = Path(
            self.call_hub(
                huggingface_hub.snapshot_download,
                allow_patterns=list(SMALL_FILES),
                **self.options(),
            )
        )

    @property
    def commit(self) -> str:
        """The commit hash, which the library's cache directory is named after."""
        return self.directory.name

    def fetch(self, file: str) -> Path:
        """Download one file. Raises FileNotFoundError if the repository lacks it, DataError if the
        request fails.
        """
        import huggingface_hub

        return Path(self.call_hub(huggingface_hub.hf_hub_download, file, **self.options()))

    def has_safetensors(self) -> bool:
        """Whether there are safetensors weights; a single file of weights is downloaded."""
        try:
            return (self.directory / WEIGHTS_INDEX).is_file() or self.fetch(WEIGHTS).is_file()
        except FileNotFoundError:
            return False

    def find_conversion(self) -> int | None:
        """The number of the conversion bot's newest pull request, None if there is none. The author
        is checked, as anybody may open one with this title.
        """
        import huggingface_hub

        api = huggingface_hub.HfApi(token=self.options()["token"])
        discussions = self.call_hub(
            lambda *args: list(
                api.get_repo_discussions(*args, author=CONVERTER, discussion_type="pull_request")
            )
        )
        numbers = [
            one.num
            for one in discussions
            if one.author == CONVERTER and one.title == CONVERSION_TITLE
        ]
        return max(numbers, default=None)

    def options(self) -> dict[str, str | None]:
        """Keyword arguments of every request."""
        return hub_options(self.revision)

    def call_hub(self, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a function of huggingface_hub on this repository, and translate its errors."""
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            return call(self.repository, *args, **options)
        except Exception as error:  # the library's own and its network client's have no common base
            is_missing = isinstance(error, EntryNotFoundError)
            # LocalEntryNotFoundError: the Hub did not answer
            if is_missing and not isinstance(error, LocalEntryNotFoundError):
                raise FileNotFoundError(f"{self.name} has no such file: {error}") from error
            raise DataError(
                f"embedding.warm_start = {self.name!r} cannot be loaded. No such directory exists,"
                f" and the request to the Hub failed: {summarise_error(error)}\n"
                f"  fix: connect to the Hub, {self.alternatives}"
            ) from error


def open_safetensors_snapshot(name: str, alternatives: str) -> HubSnapshot:
    """Open a revision with safetensors weights: the one named, else the pull request of the Hub's
    conversion bot, as transformers does (facebook/opt-125m's main branch has a pickle only, which
    is never loaded). Raises DataError if there is none.
    """
    snapshot = HubSnapshot(name, alternatives)
    if snapshot.has_safetensors():
        return snapshot
    number = None if snapshot.revision else snapshot.find_conversion()
    if number is not None:
        converted = HubSnapshot(f"{name}@refs/pr/{number}", alternatives)
        if converted.has_safetensors():
            return converted
    raise DataError(
        f"embedding.warm_start = {name!r}: the repository has no safetensors weights, and no pull"
        f" request of the Hub's conversion bot ({CONVERTER}) brings them;"
        f" {explain_pickle(snapshot.repository)}"
    )
