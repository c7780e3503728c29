"""A data source: the files of a directory."""

import sysconfig
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge

from lswt_core.errors import DataError
from lswt_core.hooks import hookimpl
from lswt_core.interfaces import DataSource, Document


class Example(DataSource):
    """The UTF-8 files of a ``directory`` that match ``pattern``, one document each; one in
    ``held_out`` is in the validation set. The default directory is Python's standard library. The
    first ``prompt_lines`` lines of each are read and not predicted.
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
        prompt_lines: Annotated[int, Ge(0)] = 0,
    ) -> None:
        self.directory = Path(directory or sysconfig.get_path("stdlib"))
        self.pattern, self.held_out, self.prompt_lines = pattern, held_out, prompt_lines
        self.selects_scored = prompt_lines > 0

    def documents(self, split: Literal["train", "valid"]) -> Iterator[Document]:
        """Change this: every document of a split, always in the same order."""
        for number, file in enumerate(sorted(self.directory.glob(self.pattern))):
            if (number % self.held_out == 0) == (split == "valid"):
                try:
                    text = file.read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError) as error:
                    raise DataError(
                        f"{file} cannot be read: {error}; fix data.directory or data.pattern"
                    ) from error
                yield Document(file.name, text, self.scored(text))

    def scored(self, text: str) -> Sequence[tuple[int, int]] | None:
        """The characters that are predicted: those after the prompt, and the text's end."""
        if not self.prompt_lines:
            return None
        prompt = "".join(text.splitlines(keepends=True)[: self.prompt_lines])
        return ((len(prompt), len(text) + 1),)

    def fingerprint(self) -> str:
        """A hash of all documents."""
        documents = [*self.documents("train"), *self.documents("valid")]
        return blake2b(repr(documents).encode()).hexdigest()


@hookimpl
def lswt_components() -> list[type]:
    """The components of this plugin."""
    return [Example]
