"""A tokenizer: UTF-8 bytes, and one token each for some characters."""

from collections.abc import Sequence
from typing import Annotated

from annotated_types import MinLen

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Tokenizer


class Example(Tokenizer):
    """Ids 0 to 255 are bytes, 256 is BOS, 257 is EOS; each of ``characters`` has one of the ids
    after these. Other characters are encoded as their UTF-8 bytes, so any text survives.
    """

    name = "example"
    citation = """@misc{lswt_example,
  title={lswt-example}, author={its authors}}"""
    bos_id, eos_id = 256, 257

    def __init__(
        self, *, characters: Annotated[str, MinLen(1)] = "äöüßàâçéèêëîïôûñ–—‘’“”…€"
    ) -> None:
        self.ids = {character: i for i, character in enumerate(dict.fromkeys(characters), 258)}
        # The bytes of every id; BOS and EOS have none.
        self.spellings = [bytes([value]) for value in range(256)] + [b"", b""]
        self.spellings += [character.encode() for character in self.ids]

    @property
    def vocab_size(self) -> int:
        """The number of ids."""
        return len(self.spellings)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Change this: the ids of each text. ``fit`` may learn from the training documents."""
        return [self.encode_text(text) for text in texts]

    def encode_text(self, text: str) -> list[int]:
        """The ids of one text."""
        ids: list[int] = []
        for character in text:
            if character in self.ids:
                ids.append(self.ids[character])
            else:
                ids.extend(character.encode())
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids. A model may generate invalid UTF-8, or an id without a token."""
        spellings = [self.spellings[i] for i in ids if i < self.vocab_size]
        return b"".join(spellings).decode(errors="replace")

    def fingerprint(self) -> str:
        """Identifies the mapping."""
        return f"lswt_example {''.join(self.ids)}"


@hookimpl
def lswt_components() -> list[type]:
    """The components of this plugin."""
    return [Example]
