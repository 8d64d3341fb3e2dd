"""A reading, a source of readings, and all sources of a machine together."""

from __future__ import annotations

import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One number that was true at one moment.

    Attributes:
        value: In ``unit``; None where it is not available.
        unit: ``bytes``, ``share`` (0 to 1), ``seconds``, ``count`` or ``cores``.
        at: When it was read, on the clock of ``time.monotonic``, in seconds.
        why: Why there is no value; empty where there is one.
    """

    value: float | None
    unit: str
    at: float
    why: str = ""

    def age(self, now: float | None = None) -> float:
        """Seconds since it was read."""
        return (time.monotonic() if now is None else now) - self.at


class Source(ABC):
    """Something that can be asked how much is left.

    Attributes:
        units: The names of all its readings, with their units. They are always all there.
        until: Names of those that count down to an end.
    """

    units: Mapping[str, str]
    until: tuple[str, ...] = ()

    def read(self) -> dict[str, Reading]:
        """All readings, now. Never raises: what fails is not available, and says why."""
        now = time.monotonic()
        try:
            found = self._values()
        except Exception as error:  # a broken driver or file must not stop a service
            found = dict.fromkeys(self.units, _told(error))
        return {name: _reading(found.get(name, "not there"), unit, now) for name, unit in self.units.items()}

    @abstractmethod
    def _values(self) -> dict[str, float | str]:
        """By name the value, or in words why there is none. May raise where nothing can be read at all."""


class Background(Source):
    """A source that is slow to answer, read by a thread of its own every ``seconds``; ``read`` gives the last answer.

    A context manager; ``close`` ends the thread. Until the first answer nothing is available. An end that the source
    has announced (``until``) stays known where it does not answer any more.
    """

    def __init__(self, source: Source, seconds: float) -> None:
        self.source, self.units, self._seconds = source, source.units, seconds
        now = time.monotonic()
        self._last = {name: _reading("not read yet", unit, now) for name, unit in source.units.items()}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=type(source).__name__, daemon=True)
        self._thread.start()

    def read(self) -> dict[str, Reading]:
        """The readings of the last round, with the time they were made at."""
        return dict(self._last)

    def close(self) -> None:
        """Ends the thread, after the answer that it may wait for."""
        self._ended.set()
        self._thread.join()

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _values(self) -> dict[str, float | str]:
        raise NotImplementedError("the thread reads the source itself")

    def _run(self) -> None:
        while not self._ended.is_set():
            self._last = _known(self._last, self.source.read(), self.source.until)
            self._ended.wait(self._seconds)


class Signals:
    """All sources of a machine. ``read`` gives the readings of all of them by name."""

    def __init__(self, sources: Sequence[Source]) -> None:
        names = [name for source in sources for name in source.units]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two sources read {twice[0]!r}; give each name one source")
        self.sources = tuple(sources)

    def read(self) -> dict[str, Reading]:
        """All readings, now."""
        return {name: reading for source in self.sources for name, reading in source.read().items()}


def each(values: Mapping[str, Callable[[], float]]) -> dict[str, float | str]:
    """Asks for each value by itself, so that one that fails leaves the others."""
    found: dict[str, float | str] = {}
    for name, ask in values.items():
        try:
            found[name] = ask()
        except Exception as error:  # as in Source.read
            found[name] = _told(error)
    return found


def _known(last: Mapping[str, Reading], found: dict[str, Reading], until: Sequence[str]) -> dict[str, Reading]:
    """What was found; an end that was announced does not go away because nobody answers."""
    for name in until:
        before, now = last[name], found[name]
        if now.value is None and before.value is not None and math.isfinite(before.value):
            left = max(0.0, before.value - (now.at - before.at))
            found[name] = replace(now, value=left, why="")
    return found


def _told(error: Exception) -> str:
    if type(error) is ValueError:  # a source's own words
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _reading(value: float | str, unit: str, now: float) -> Reading:
    if isinstance(value, str):
        return Reading(value=None, unit=unit, at=now, why=value)
    return Reading(value=float(value), unit=unit, at=now)
