"""A model of the HuggingFace Hub, brought here as far as its table of word embeddings needs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lswt_core.errors import DataError
from lswt_core.model.embedding_init.tensors import WEIGHTS, WEIGHTS_INDEX, explain_pickle
from lswt_core.plugin_api.hub import hub_options, summarise_error

# small, and needed besides the weights
SMALL_FILES = ("config.json", WEIGHTS_INDEX, "tokenizer.json", "vocab.json", "added_tokens.json")
# of the Hub's own safetensors-conversion service
CONVERTER, CONVERSION_TITLE = "SFconvertbot", "Adding `safetensors` variant of this model"


class HubSnapshot:
    """One version of a repository, partly here: "owner/name", or "owner/name@revision"."""

    def __init__(self, name: str, ways_out: str) -> None:
        """Bring the small files. Raises DataError, which ends in the alternatives ``ways_out``, if
        the Hub cannot be asked.
        """
        import huggingface_hub

        self.name, self.ways_out = name, ways_out
        self.repository, _, revision = name.partition("@")
        self.revision = revision or None
        self.directory = Path(
            self.ask(
                huggingface_hub.snapshot_download,
                allow_patterns=list(SMALL_FILES),
                **self.version(),
            )
        )

    @property
    def commit(self) -> str:
        """The exact version: the library's cache names its directories so."""
        return self.directory.name

    def fetch(self, file: str) -> Path:
        """Bring one file. Raises DataError if the Hub cannot be asked, FileNotFoundError if it does
        not have it.
        """
        import huggingface_hub

        return Path(self.ask(huggingface_hub.hf_hub_download, file, **self.version()))

    def has_safetensors(self) -> bool:
        """Whether there are weights that can be read safely; if they are in one file it is brought
        here.
        """
        try:
            return (self.directory / WEIGHTS_INDEX).is_file() or self.fetch(WEIGHTS).is_file()
        except FileNotFoundError:
            return False

    def conversion(self) -> int | None:
        """The number of the conversion bot's newest pull request. Its author is checked: anybody
        may open one.
        """
        import huggingface_hub

        api = huggingface_hub.HfApi(token=self.version()["token"])
        found = self.ask(
            lambda *given: list(
                api.get_repo_discussions(*given, author=CONVERTER, discussion_type="pull_request")
            )
        )
        return max(
            (one.num for one in found if one.author == CONVERTER and one.title == CONVERSION_TITLE),
            default=None,
        )

    def version(self) -> dict[str, str | None]:
        """What every download is asked with."""
        return hub_options(self.revision)

    def ask(self, call: Callable[..., Any], *given: Any, **options: Any) -> Any:
        """Let the library ask the Hub about this repository, and say in our words what goes wrong."""
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            return call(self.repository, *given, **options)
        except Exception as error:  # the library's own and its network client's have no common base
            # the Hub has answered
            if isinstance(error, EntryNotFoundError) and not isinstance(
                error, LocalEntryNotFoundError
            ):
                raise FileNotFoundError(f"{self.name} has no such file: {error}") from error
            raise DataError(
                f"embedding.warm_start = {self.name!r} cannot be loaded. No such directory is here,"
                f" and asking the Hub failed: {summarise_error(error)}\n  fix: connect to the Hub,"
                f" {self.ways_out}"
            ) from error


def open_safetensors_snapshot(name: str, ways_out: str) -> HubSnapshot:
    """A version that has safetensors weights: the one that is named, else the pull request of the
    Hub's conversion bot, as transformers does. (facebook/opt-125m's main branch has a pickle only,
    which is never loaded.) Raises DataError if there is none.
    """
    found = HubSnapshot(name, ways_out)
    if found.has_safetensors():
        return found
    number = None if found.revision else found.conversion()
    if number is not None:
        converted = HubSnapshot(f"{name}@refs/pr/{number}", ways_out)
        if converted.has_safetensors():
            return converted
    raise DataError(
        f"embedding.warm_start = {name!r}: the repository has no safetensors weights, and no pull"
        f" request of the Hub's conversion bot ({CONVERTER}) brings them;"
        f" {explain_pickle(found.repository)}"
    )
