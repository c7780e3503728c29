"""A data source: the files of a directory."""

import sysconfig
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge

from lswt_core.errors import DataError
from lswt_core.hooks import hookimpl
from lswt_core.interfaces import DataSource, Document


class Example(DataSource):
    """The UTF-8 files of a ``directory`` that match ``pattern``, one document each; one in
    ``held_out`` is in the validation set. The default directory is Python's standard library.
    """

    name = "example"
    citation = """@misc{lswt_example,
  title={lswt-example}, author={its authors}}"""

    def __init__(
        self,
        *,
        directory: str | None = None,
        pattern: str = "*.py",
        held_out: Annotated[int, Ge(2)] = 20,
    ) -> None:
        self.directory = Path(directory or sysconfig.get_path("stdlib"))
        self.pattern, self.held_out = pattern, held_out

    def documents(self, split: Literal["train", "valid"]) -> Iterator[Document]:
        """Change this: every document of a split, always in the same order."""
        for number, file in enumerate(sorted(self.directory.glob(self.pattern))):
            if (number % self.held_out == 0) == (split == "valid"):
                try:
                    yield Document(file.name, file.read_text(encoding="utf-8"))
                except (OSError, UnicodeDecodeError) as error:
                    raise DataError(
                        f"{file} cannot be read: {error}; fix data.directory or data.pattern"
                    ) from error

    def fingerprint(self) -> str:
        """A hash of all documents."""
        documents = [*self.documents("train"), *self.documents("valid")]
        return blake2b(repr(documents).encode()).hexdigest()


@hookimpl
def lswt_components() -> list[type]:
    """The components of this plugin."""
    return [Example]
