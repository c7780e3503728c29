"""The registry: which plugins there are, which of them offers a component, and its class."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

from pydantic import BaseModel

from lswt_core.errors import PluginError
from lswt_core.registry import importer as live
from lswt_core.registry import option_schema as schema
from lswt_core.registry import static_reader as source
from lswt_core.registry.blame import Culprit, culprit
from lswt_core.registry.discover import Entry, from_file, from_module, installed, normal
from lswt_core.registry.kinds import KINDS
from lswt_core.registry.offer import Broken, Offer
from lswt_core.registry.suggest import nearest

LIST = "python -m lswt_core plugins list"


class NotOffered(PluginError):
    """No plugin offers a component of this kind and name."""

    def __init__(
        self, kind: str, name: str, offers: Sequence[Offer], broken: Sequence[Broken]
    ) -> None:
        self.kind, self.name, self.broken = kind, name, tuple(broken)
        self.names = tuple(sorted({offer.name for offer in offers if offer.kind == kind}))
        self.nearest = nearest(name.rpartition(":")[2], self.names)
        self.other_kinds = tuple(sorted({offer.kind for offer in offers if offer.name == name}))
        guess = f'; did you mean "{self.nearest}"?' if self.nearest else ""
        super().__init__(
            f'no plugin offers the {kind} "{name}"{guess} {self.details()} (see: {LIST})'
        )

    def details(self) -> str:
        """What is offered instead, and which plugins could not be read."""
        parts = [f"offered: {', '.join(self.names) or 'none'}"]
        parts += (
            [f'"{self.name}" is a component of kind {" and ".join(self.other_kinds)}']
            if self.other_kinds
            else []
        )
        parts += [f"broken plugins: {'; '.join(map(str, self.broken))}"] if self.broken else []
        return ". ".join(parts)


class Registry:
    """Plugins and their offers. Installed is not active: a plugin is read when a component is
    looked up, imported when loaded.
    """

    def __init__(
        self, plugins: Iterable[ModuleType] | None = None, *, files: Sequence[Path] = ()
    ) -> None:
        """All installed plugins, or exactly the modules given; ``files`` are single-file plugins
        besides.
        """
        entries = installed() if plugins is None else map(from_module, plugins)
        self.entries = (*entries, *map(from_file, files))
        self._texts: dict[Entry, list[Offer] | None] = {}
        self._readings: dict[Entry, list[Offer] | Broken] = {}
        self._schemas: dict[tuple[str, str, str], type[BaseModel]] = {}
        self._classes: dict[Entry, list[type]] = {}

    def offers(self) -> list[Offer]:
        """Everything offered, by kind and name."""
        readings = [self._read(entry) for entry in self.entries]
        offers = [
            offer for reading in readings if not isinstance(reading, Broken) for offer in reading
        ]
        order = list(KINDS)
        return sorted(
            offers,
            key=lambda offer: (
                order.index(offer.kind),
                offer.name,
                offer.distribution,
                offer.module,
            ),
        )

    def broken(self) -> list[Broken]:
        """Every plugin that cannot be read."""
        return [
            reading for entry in self.entries if isinstance(reading := self._read(entry), Broken)
        ]

    def find(self, kind: str, name: str) -> Offer:
        """The one component of that kind and name, which may be qualified: "distribution:name".

        Plugins named like the component are read first, even if that means to import them; the text
        of the others is only looked at for a clash. Raises PluginError on a clash and NotOffered if
        there is none.
        """
        distribution, _, plain = name.rpartition(":")
        entries = [
            entry
            for entry in self.entries
            if not distribution or normal(entry.distribution) == normal(distribution)
        ]
        likely = [entry for entry in entries if entry.suggests(plain)]
        readings = {
            entry: self._read(entry) if entry in likely else self._text(entry) or []
            for entry in entries
        }
        found = select(readings.values(), kind, plain)
        if not found:
            readings = {entry: self._read(entry) for entry in entries}
            found = select(readings.values(), kind, plain)
        rivals = [
            reading
            for entry, reading in readings.items()
            if isinstance(reading, Broken) and entry.name == plain
        ]
        if not found:
            raise NotOffered(kind, name, self.offers(), self.broken())
        if len(found) + len(rivals) > 1:
            raise clash(kind, plain, found, rivals)
        return found[0]

    def get(self, kind: str, name: str) -> type:
        """The class of the one component of that kind and name, imported."""
        return self.load(self.find(kind, name))

    def load(self, offer: Offer) -> type:
        """Import the class behind an offer and check that it is what was offered."""
        entry = next(
            (
                e
                for e in self.entries
                if (e.distribution, e.module) == (offer.distribution, offer.module)
            ),
            None,
        )
        if entry is None:
            raise PluginError(
                f"{offer.kind} {offer.qualified!r} is not offered by a plugin of this registry;"
                " look it up with find()"
            )
        for component in self._imported(entry):
            if (
                live.kind_of(entry, component) == offer.kind
                and getattr(component, "name", None) == offer.name
            ):
                return component
        raise PluginError(
            f"{entry} does not offer the {offer.kind} {offer.name!r} that its source promises; give"
            " its class a literal name"
        )

    def require_files(self) -> None:
        """Import every single-file plugin, used or not: whoever names one wants it. Raises
        PluginError if one cannot be.
        """
        for entry in self.entries:
            if entry.path is not None:
                self._imported(entry)

    def culprit(self, error: BaseException) -> Culprit | None:
        """The plugin in whose code an exception was raised; None if it was raised elsewhere."""
        return culprit(error, self.entries)

    def schema(self, offer: Offer) -> type[BaseModel]:
        """A strict pydantic model of a component's options."""
        key = (offer.kind, offer.qualified, offer.module)
        if key not in self._schemas:
            self._schemas[key] = schema.build(offer)
        return self._schemas[key]

    def _imported(self, entry: Entry) -> list[type]:
        """The classes a plugin offers."""
        if entry not in self._classes:
            self._classes[entry] = live.classes(entry)
        return self._classes[entry]

    def _text(self, entry: Entry) -> list[Offer] | None:
        """What a plugin's source tells; None if it must be imported."""
        if entry not in self._texts:
            try:
                self._texts[entry] = None if entry.live else source.read(entry)
            except source.Unreadable:
                self._texts[entry] = None
        return self._texts[entry]

    def _read(self, entry: Entry) -> list[Offer] | Broken:
        """A plugin's offers, from its source or else by importing it."""
        if entry not in self._readings:
            reading: list[Offer] | Broken | None = self._text(entry)
            if reading is None:
                try:
                    reading = live.read(entry)
                except PluginError as error:
                    reading = Broken(entry.name, entry.distribution, entry.version, str(error))
            self._readings[entry] = reading
        return self._readings[entry]


def select(readings: Iterable[list[Offer] | Broken], kind: str, name: str) -> list[Offer]:
    """The offers of that kind and name."""
    offers = [offer for reading in readings if not isinstance(reading, Broken) for offer in reading]
    return [offer for offer in offers if (offer.kind, offer.name) == (kind, name)]


def clash(kind: str, name: str, found: Sequence[Offer], rivals: Sequence[Broken]) -> PluginError:
    """Several plugins claim one name."""
    claims = [f"{offer.distribution} {offer.version} ({offer.source})" for offer in found]
    claims += [f"{rival.distribution} {rival.version} (broken: {rival.cause})" for rival in rivals]
    first = found[0]
    return PluginError(
        f'the {kind} "{name}" is claimed by {" and by ".join(claims)}; '
        f'say which one is meant, e.g. use = "{first.qualified}", or uninstall one'
    )
