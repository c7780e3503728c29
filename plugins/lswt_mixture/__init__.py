"""A weighted mixture of data sources."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Annotated, Any, Literal

from annotated_types import Gt

from lswt_core.errors import DataError
from lswt_core.hooks import hookimpl
from lswt_core.interfaces import DataSource, Document
from lswt_core.plugin_api.documents import documents_after

Split = Literal["train", "valid"]
Unit = Literal["bytes", "documents"]


class Mixture(DataSource):
    """Several sources, mixed document by document in proportion to their ``weights`` (by default
    equal), which are shares of the text: of its ``bytes``, or of its ``documents``.

    The next document is taken from the source that has given least of its share, of equals the
    first by name. So the order is the same everywhere, no random number decides, and at any point a
    source is ahead of its share by less than one document.

    The epoch ends with ``stop = "first-exhausted"`` when a source runs out, so that proportions
    hold to the end. With "all-exhausted", shorter sources are read again until every document of
    every source was read.

    The validation set is the same mixture of the sources' own validation sets; it ends when one
    runs out, whatever ``stop`` says, so that no text counts twice. The mixture streams if a source
    does. Recall tasks are mixed with each other alone, and with one ``segment``: behind another
    text, a question could be in the segment of its facts.
    """

    name = "mixture"

    def __init__(
        self,
        *,
        sources: Mapping[str, DataSource],
        weights: dict[str, Annotated[float, Gt(0)]] | None = None,
        unit: Unit = "bytes",
        stop: Literal["first-exhausted", "all-exhausted"] = "first-exhausted",
    ) -> None:
        if not sources:
            raise ValueError("it mixes no sources: write [data.sources.NAME] for each")
        self.sources = dict(sorted(sources.items()))
        self.weights = dict.fromkeys(self.sources, 1.0) if weights is None else weights
        if self.weights.keys() != self.sources.keys():
            raise ValueError(
                f"weights are given for {', '.join(sorted(self.weights)) or 'none'}, but the"
                f" sources are {', '.join(self.sources)}"
            )
        self.unit, self.stop = unit, stop
        self.streaming = any(source.streaming for source in self.sources.values())
        self.selects_scored = any(source.selects_scored for source in self.sources.values())
        self.segment_length = common_segment_length(self.sources)
        self._amounts: dict[str, int] = {}  # that each source has given, and which have ended
        self._ended: set[str] = set()

    def documents(self, split: Split, after: Mapping[str, Any] | None = None) -> Iterator[Document]:
        """The documents of a split, after a ``state()``; the id begins with the name of the
        source.
        """
        again = split == "train" and self.stop == "all-exhausted"
        states = {} if after is None else after["sources"]
        readers = {
            name: documents_after(source, split, states.get(name))
            for name, source in self.sources.items()
        }
        amounts = self._amounts = dict.fromkeys(readers, 0) | (after["amounts"] if after else {})
        ended = self._ended = set(after["ended"] if after else ())
        while True:
            name = min(readers, key=lambda name: amounts[name] / self.weights[name])
            document = next(readers[name], None)
            if document is None:
                ended.add(name)
                if not again or len(ended) == len(readers):
                    break
                readers[name] = self.sources[name].documents(split)
                document = next(readers[name], None)
            if document is None:
                break
            amounts[name] += size(document) if self.unit == "bytes" else 1
            yield document._replace(id=f"{name}/{document.id}")
        if missing := [name for name, amount in amounts.items() if not amount]:
            raise DataError(
                f"source {missing[0]!r} of the mixture has no document in its {split} split"
            )

    def state(self) -> dict[str, Any] | None:
        """What each source has given, and their own states; None unless all that were read have
        one.
        """
        read = {name for name, amount in self._amounts.items() if amount} | self._ended
        states = {name: self.sources[name].state() for name in sorted(read)}
        if not states or None in states.values():
            return None
        return {"amounts": dict(self._amounts), "ended": sorted(self._ended), "sources": states}

    def fingerprint(self) -> str:
        """A hash of the sources' fingerprints, and of all that decides the order."""
        parts = [
            [name, self.weights[name], source.fingerprint()]
            for name, source in self.sources.items()
        ]
        return blake2b(json.dumps([self.unit, self.stop, parts]).encode()).hexdigest()[:32]

    def n_bytes(self, split: Split) -> int | None:
        """The size of the source that ends the epoch, over its share; None if a source does not
        know its size, or shares are of documents.
        """
        sizes = {name: source.n_bytes(split) for name, source in self.sources.items()}
        if self.unit == "documents" or None in sizes.values():
            return None
        epochs = [(sizes[name] or 0) / self.weights[name] for name in sizes]
        again = split == "train" and self.stop == "all-exhausted"
        return round((max(epochs) if again else min(epochs)) * sum(self.weights.values()))


def common_segment_length(sources: Mapping[str, DataSource]) -> int | None:
    """The segment length of all sources; raises ValueError if they have several."""
    lengths = {name: source.segment_length for name, source in sources.items()}
    if len({*lengths.values()}) > 1:
        listed = ", ".join(f"{name}: {length or 'any'}" for name, length in lengths.items())
        raise ValueError(
            f"the segments that its sources make documents for have different lengths ({listed}),"
            " so that documents would not begin where segments do: give all one length, or leave"
            " out those that have another"
        )
    return next(iter(lengths.values()))


def size(document: Document) -> int:
    """The bytes of a document's text; an empty one counts as one."""
    return max(1, len(document.text.encode("utf-8", "surrogatepass")))


@hookimpl
def lswt_components() -> list[type]:
    """Offer the mixture."""
    return [Mixture]
