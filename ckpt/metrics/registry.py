"""The numbers of this process: counters, gauges and histograms. The core adds to them, and knows nothing of who reads them.

Adapters read them when they are asked: prometheus_collector.py, opentelemetry_bridge.py, text_format.py.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import logging
import os
import socket
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from ckpt.metrics.instruments import HISTOGRAM, INSTRUMENTS, WATCHED, Instrument

logger = logging.getLogger("ckpt")

_RUN_IDS = ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID")  # by which launchers name a job
_NO_RUN = ("", "none")  # what torchrun says if nobody has named it

Reading = tuple[str, float, Mapping[str, str]]  # the name of a gauge, its value, and its attributes
Observer = Callable[[], Iterable[Reading]]
Listener = Callable[[Instrument, float, Mapping[str, str]], None]
_Values = tuple[str, ...]  # of attributes, in the order in which the instrument names them


@dataclasses.dataclass
class Distribution:
    """Of what a histogram has been given.

    Attributes:
        counts: how many fell into each bucket, and into that above all bounds.
    """

    bounds: tuple[float, ...]
    counts: list[int]
    sum: float = 0.0

    @property
    def count(self) -> int:
        return sum(self.counts)

    def cumulative(self) -> list[int]:
        """How many are at most as large as each bound, and how many there are in all."""
        return list(itertools.accumulate(self.counts))


class Sample(NamedTuple):
    attributes: Mapping[str, str]
    value: float | Distribution


class Metric(NamedTuple):
    """An instrument, and all its series."""

    instrument: Instrument
    samples: list[Sample]


class Registry:
    """Safe to use from any thread, and from a signal handler. A forked child begins with nothing.

    Attributes:
        run: names the job, the same on all its ranks; as its launcher does, if nobody has named it.
        rank, host: of this process.
    """

    def __init__(self) -> None:
        self.run = _launched_as()
        self.rank = 0
        self.host = socket.gethostname()
        self._observers: list[Callable[[], Observer | None]] = []
        self._begin()
        _registries.add(self)

    def _begin(self) -> None:
        """Also in a forked child, which has no part in what its parent has open."""
        self._world_size = 0
        self._observers = [held for held in self._observers if not isinstance(held, weakref.WeakMethod)]
        self._lock = threading.RLock()  # a signal handler may save
        self._values: dict[str, dict[_Values, float]] = {}  # of counters and gauges; guarded by _lock, as is all that follows
        self._distributions: dict[str, dict[_Values, Distribution]] = {}
        self._listeners: list[Listener] = []

    # ---- for the core ----------------------------------------------------------------------------------------------

    def take_part(self, rank: int, world_size: int) -> None:
        """This process saves as this rank. Of several jobs in one process the largest names it."""
        if world_size >= self._world_size:
            self.rank, self._world_size = rank, world_size

    def add(self, name: str, amount: float = 1, **attributes: str) -> None:
        """To a counter."""
        instrument = INSTRUMENTS[name]
        key = _key(instrument, attributes)
        with self._lock:
            series = self._values.setdefault(name, {})
            series[key] = series.get(key, 0) + amount

    def set(self, name: str, value: float, **attributes: str) -> None:
        """A gauge."""
        key = _key(INSTRUMENTS[name], attributes)
        with self._lock:
            self._values.setdefault(name, {})[key] = value

    def observe(self, name: str, value: float, **attributes: str) -> None:
        """One more value for a histogram."""
        instrument = INSTRUMENTS[name]
        key = _key(instrument, attributes)
        with self._lock:
            series = self._distributions.setdefault(name, {})
            found = series.get(key)
            if found is None:
                found = series[key] = Distribution(instrument.buckets, [0] * (len(instrument.buckets) + 1))
            found.counts[bisect.bisect_left(found.bounds, value)] += 1
            found.sum += value
            listeners = list(self._listeners)
        for listener in listeners:
            _guarded(listener, instrument, value, attributes)

    def watch(self, observer: Observer) -> None:
        """From now on its gauges are read whenever somebody collects. A method is forgotten with its object.

        What several observers say of one series is added up.
        """
        held: Callable[[], Observer | None]
        held = weakref.WeakMethod(observer) if isinstance(observer, types.MethodType) else lambda: observer
        with self._lock:
            self._observers = [*(each for each in self._observers if each() is not None), held]

    # ---- for those who read ----------------------------------------------------------------------------------------

    def listen(self, listener: Listener) -> None:
        """It is told of each value that a histogram gets from now on, on the thread that gives it."""
        with self._lock:
            self._listeners.append(listener)

    def constants(self) -> dict[str, str]:
        """Attributes that all series have."""
        return {"run": self.run, "rank": str(self.rank), "host": self.host}

    def collect(self, only: str | None = None) -> list[Metric]:
        """All instruments that have a value, or one of them, as they are now."""
        with self._lock:
            values = {name: dict(series) for name, series in self._values.items()}
            distributions = {
                name: {key: dataclasses.replace(each, counts=list(each.counts)) for key, each in series.items()}
                for name, series in self._distributions.items()
            }
            observers = [observer for held in self._observers if (observer := held()) is not None]
        if only is not None and only not in WATCHED:
            observers = []
        read: dict[str, dict[_Values, float]] = {}
        for name, value, attributes in [reading for observer in observers for reading in _read(observer)]:
            series, key = read.setdefault(name, {}), _key(INSTRUMENTS[name], attributes)
            series[key] = series.get(key, 0) + value
        values |= read
        values["ckpt.info"] = {_versions(): 1}
        found = []
        for name, instrument in INSTRUMENTS.items():
            told: Mapping[_Values, float | Distribution]
            told = distributions.get(name, {}) if instrument.kind == HISTOGRAM else values.get(name, {})
            samples = [Sample(dict(zip(instrument.attributes, key, strict=True)), value) for key, value in told.items()]
            if samples and only in (None, name):
                found.append(Metric(instrument, samples))
        return found


def _key(instrument: Instrument, attributes: Mapping[str, str]) -> _Values:
    """
    Raises:
        KeyError: the instrument has no such attribute.
    """
    found = tuple(attributes.get(name, "") for name in instrument.attributes)
    if unknown := attributes.keys() - set(instrument.attributes):
        raise KeyError(f"{instrument.name} has no attribute {sorted(unknown)}")
    return found


def _read(observer: Observer) -> list[Reading]:
    """Nothing, if it fails: a disk that does not answer must not hide the other numbers."""
    try:
        return list(observer())
    except Exception:
        logger.debug("a gauge could not be read", exc_info=True)
        return []


def _guarded(listener: Listener, instrument: Instrument, value: float, attributes: Mapping[str, str]) -> None:
    """What an exporter raises is no matter of who saves."""
    try:
        listener(instrument, value, attributes)
    except Exception:
        logger.debug("an exporter of metrics failed", exc_info=True)


def _versions() -> _Values:
    torch = sys.modules.get("torch")
    return str(getattr(sys.modules.get("ckpt"), "__version__", "")), str(getattr(torch, "__version__", ""))


def _launched_as() -> str:
    return next((name for key in _RUN_IDS if (name := os.environ.get(key, "")) not in _NO_RUN), "")


_registries: weakref.WeakSet[Registry] = weakref.WeakSet()


def _begin_anew_in_child() -> None:
    """What was counted so far the parent tells, which may have held the lock just then."""
    for registry in list(_registries):
        registry._begin()


os.register_at_fork(after_in_child=_begin_anew_in_child)

# That of the process, for all that saves and restores in it: an exporter has one, however many Checkpointers there are.
PROCESS = Registry()
