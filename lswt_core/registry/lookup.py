"""The registry: looks up components by kind and name, and imports their classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

from pydantic import BaseModel

from lswt_core.errors import PluginError
from lswt_core.registry import importer, option_schema, static_reader
from lswt_core.registry.blame import Culprit, culprit
from lswt_core.registry.discover import Entry, entry_of_file, entry_of_module, installed, normal
from lswt_core.registry.kinds import KINDS
from lswt_core.registry.offer import Broken, Offer
from lswt_core.registry.source_file import Unreadable
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
        """The names on offer, and the plugins that could not be read."""
        parts = [f"offered: {', '.join(self.names) or 'none'}"]
        if self.other_kinds:
            kinds = " and ".join(self.other_kinds)
            parts.append(f'"{self.name}" is a component of kind {kinds}')
        if self.broken:
            parts.append(f"broken plugins: {'; '.join(map(str, self.broken))}")
        return ". ".join(parts)


class Registry:
    """Plugins and the components they offer. A plugin is read when a component is looked up, and
    imported when one of its components is loaded.
    """

    def __init__(
        self, plugins: Iterable[ModuleType] | None = None, *, files: Sequence[Path] = ()
    ) -> None:
        """Take all installed plugins, or exactly the modules given, and single-file plugins."""
        entries = installed() if plugins is None else map(entry_of_module, plugins)
        self.entries = (*entries, *map(entry_of_file, files))
        self._from_source: dict[Entry, list[Offer] | None] = {}
        self._readings: dict[Entry, list[Offer] | Broken] = {}
        self._schemas: dict[tuple[str, str, str], type[BaseModel]] = {}
        self._classes: dict[Entry, list[type]] = {}

    def offers(self) -> list[Offer]:
        """Every component on offer, by kind and name."""
        order = list(KINDS)

        def place(offer: Offer) -> tuple[int, str, str, str]:
            return order.index(offer.kind), offer.name, offer.distribution, offer.module

        return sorted(sound(self._read(entry) for entry in self.entries), key=place)

    def broken(self) -> list[Broken]:
        """Every plugin that cannot be read."""
        readings = [self._read(entry) for entry in self.entries]
        return [reading for reading in readings if isinstance(reading, Broken)]

    def find(self, kind: str, name: str) -> Offer:
        """Look up the one component of a kind and name ("rope", or "distribution:name").

        Plugins named like the component are read, and imported if their source does not suffice;
        of the others only the source is read, to find a clash. Raises NotOffered if there is no
        such component, PluginError if several plugins offer it.
        """
        distribution, _, plain = name.rpartition(":")
        entries = list(self.entries)
        if distribution:
            entries = [one for one in entries if normal(one.distribution) == normal(distribution)]
        readings: dict[Entry, list[Offer] | Broken] = {}
        for entry in entries:
            likely = entry.suggests(plain)
            readings[entry] = self._read(entry) if likely else self._read_source(entry) or []
        offers = select(readings.values(), kind, plain)
        if not offers:
            readings = {entry: self._read(entry) for entry in entries}
            offers = select(readings.values(), kind, plain)
        if not offers:
            raise NotOffered(kind, name, self.offers(), self.broken())
        rivals = [
            reading
            for entry, reading in readings.items()
            if isinstance(reading, Broken) and entry.name == plain
        ]
        if len(offers) + len(rivals) > 1:
            raise clash(kind, plain, offers, rivals)
        return offers[0]

    def get(self, kind: str, name: str) -> type:
        """Import the class of the one component of that kind and name; raises as ``find``."""
        return self.load(self.find(kind, name))

    def load(self, offer: Offer) -> type:
        """Import the class behind an offer. Raises PluginError if its plugin cannot be imported,
        or does not have what its source promises.
        """
        entry = self._entry_of(offer)
        for component in self._import(entry):
            name = getattr(component, "name", None)
            if name == offer.name and importer.kind_of(entry, component) == offer.kind:
                return component
        raise PluginError(
            f"{entry} does not offer the {offer.kind} {offer.name!r} that its source promises; give"
            " its class a literal name"
        )

    def require_files(self) -> None:
        """Import every single-file plugin, used or not. Raises PluginError if one cannot be."""
        for entry in self.entries:
            if entry.path is not None:
                self._import(entry)

    def culprit(self, error: BaseException) -> Culprit | None:
        """The plugin whose code raised an exception; None if it is no plugin's."""
        return culprit(error, self.entries)

    def schema(self, offer: Offer) -> type[BaseModel]:
        """The strict pydantic model of a component's options."""
        key = (offer.kind, offer.qualified, offer.module)
        if key not in self._schemas:
            self._schemas[key] = option_schema.build(offer)
        return self._schemas[key]

    def _entry_of(self, offer: Offer) -> Entry:
        """The plugin that makes an offer."""
        for entry in self.entries:
            if (entry.distribution, entry.module) == (offer.distribution, offer.module):
                return entry
        raise PluginError(
            f"{offer.kind} {offer.qualified!r} is not offered by a plugin of this registry; look it"
            " up with find()"
        )

    def _import(self, entry: Entry) -> list[type]:
        """The classes of a plugin, imported once."""
        if entry not in self._classes:
            self._classes[entry] = importer.component_classes(entry)
        return self._classes[entry]

    def _read_source(self, entry: Entry) -> list[Offer] | None:
        """A plugin's offers by its source; None if it must be imported."""
        if entry not in self._from_source:
            try:
                offers = None if entry.live else static_reader.read_offers(entry)
            except Unreadable:
                offers = None
            self._from_source[entry] = offers
        return self._from_source[entry]

    def _read(self, entry: Entry) -> list[Offer] | Broken:
        """A plugin's offers, from its source or else by importing it."""
        if entry not in self._readings:
            reading: list[Offer] | Broken | None = self._read_source(entry)
            if reading is None:
                try:
                    reading = importer.read_offers(entry)
                except PluginError as error:
                    reading = Broken(entry.name, entry.distribution, entry.version, str(error))
            self._readings[entry] = reading
        return self._readings[entry]


def select(readings: Iterable[list[Offer] | Broken], kind: str, name: str) -> list[Offer]:
    """The offers of that kind and name."""
    return [offer for offer in sound(readings) if (offer.kind, offer.name) == (kind, name)]


def sound(readings: Iterable[list[Offer] | Broken]) -> list[Offer]:
    """The offers of all plugins that are not broken."""
    offers: list[Offer] = []
    for reading in readings:
        if not isinstance(reading, Broken):
            offers += reading
    return offers


def clash(kind: str, name: str, offers: Sequence[Offer], rivals: Sequence[Broken]) -> PluginError:
    """The error for several plugins that offer one component."""
    claims = [f"{offer.distribution} {offer.version} ({offer.source})" for offer in offers]
    claims += [f"{rival.distribution} {rival.version} (broken: {rival.cause})" for rival in rivals]
    first = offers[0]
    return PluginError(
        f'the {kind} "{name}" is claimed by {" and by ".join(claims)}; '
        f'say which one is meant, e.g. use = "{first.qualified}", or uninstall one'
    )
