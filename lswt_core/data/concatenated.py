"""Several token files read as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

import numpy as np


class ConcatenatedIds:
    """Arrays of ids [n] end to end, read like one array by integer arrays and slices. Nothing but
    what is asked for is read.
    """

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self.arrays, self.dtype = list(arrays), arrays[0].dtype
        # [arrays + 1] where each begins
        self.bounds = np.concatenate(([0], np.cumsum([len(array) for array in arrays])))

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def __getitem__(self, index: np.ndarray | slice) -> np.ndarray:
        """The ids at some places, in the shape of ``index``, or of a slice without a step."""
        if isinstance(index, slice):
            return self._slice(*index.indices(len(self))[:2])
        places = index.ravel()
        which = np.searchsorted(self.bounds, places, side="right") - 1
        order = np.argsort(which, kind="stable")  # the places, array by array
        chosen, firsts = np.unique(which[order], return_index=True)
        ids = np.empty(len(places), self.dtype)
        for number, begin, end in zip(chosen, firsts, [*firsts[1:], len(order)], strict=False):
            group = order[begin:end]
            ids[group] = self.arrays[number][places[group] - self.bounds[number]]
        return ids.reshape(index.shape)

    def _slice(self, begin: int, end: int) -> np.ndarray:
        """The ids from ``begin`` to ``end``."""
        first = int(np.searchsorted(self.bounds, begin, side="right")) - 1
        parts = [np.empty(0, self.dtype)]
        for number in range(first, len(self.arrays)):
            start = int(self.bounds[number])
            if start >= end:
                break
            parts.append(self.arrays[number][max(0, begin - start) : end - start])
        return np.concatenate(parts)


class ConcatenatedNames(Sequence[str]):
    """Names of the documents of several files, read file by file when they are asked for."""

    def __init__(self, counts: Sequence[int], read: Sequence[Callable[[], list[str]]]) -> None:
        """``read[i]`` reads the ``counts[i]`` names of file i."""
        self.bounds, self.read = np.concatenate(([0], np.cumsum(counts))), read
        self._file, self._names = -1, list[str]()  # of the file that was read last

    def __len__(self) -> int:
        return int(self.bounds[-1])

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """A document's name, or those of a slice."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        file = int(np.searchsorted(self.bounds, index, side="right")) - 1
        if file != self._file:
            self._file, self._names = file, self.read[file]()
        return self._names[index - int(self.bounds[file])]
