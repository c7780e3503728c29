"""A tokenizer: bytes, and characters of your choice as one token each."""

from collections.abc import Sequence
from typing import Annotated

from annotated_types import MinLen

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Tokenizer


class Example(Tokenizer):
    """Ids 0 to 255 are bytes, 256 begins and 257 ends a document; each of ``characters`` has an id
    of its own after these. Any text is read and written back unchanged: characters that have no id
    are their UTF-8 bytes.
    """

    name = "example"
    citation = "@misc{lswt_example, title={lswt-example}, author={its authors}}"
    begin, end = 256, 257

    def __init__(
        self, *, characters: Annotated[str, MinLen(1)] = "äöüßàâçéèêëîïôûñ–—‘’“”…€"
    ) -> None:
        self.ids = {
            character: (258 + number,) for number, character in enumerate(dict.fromkeys(characters))
        }
        self.spellings = [
            *(bytes([value]) for value in range(256)),
            b"",
            b"",
            *map(str.encode, self.ids),
        ]

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self.spellings)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Change how text is cut; ``fit`` may learn it from the training documents."""
        return [
            [
                number
                for character in text
                for number in self.ids.get(character) or character.encode()
            ]
            for text in texts
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; a model may write what is no UTF-8, or an id that no text has."""
        return b"".join(
            self.spellings[number] for number in ids if number < self.vocab_size
        ).decode(errors="replace")

    def fingerprint(self) -> str:
        """Another mapping, another text."""
        return f"lswt_example {''.join(self.ids)}"


@hookimpl
def lswt_components() -> list[type]:
    """What this plugin offers."""
    return [Example]
