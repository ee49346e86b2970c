"""The metrics of this process as instruments of OpenTelemetry. Only its API is used: the SDK decides where they go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ckpt.metrics.instruments import COUNTER, HISTOGRAM, INSTRUMENTS, Instrument
from ckpt.metrics.registry import PROCESS, Distribution, Registry


class Bridge:
    """Counters and gauges are read when the SDK wants them; a histogram cannot be, and is told of each value as it comes.

    Args:
        meter: of OpenTelemetry.
    """

    def __init__(self, meter: Any, registry: Registry = PROCESS) -> None:
        self._registry = registry
        self._histograms: dict[str, Any] = {}
        self._instruments: list[Any] = []
        for instrument in INSTRUMENTS.values():
            if instrument.kind == HISTOGRAM:
                self._histograms[instrument.name] = _histogram(meter, instrument)
                continue
            create = meter.create_observable_counter if instrument.kind == COUNTER else meter.create_observable_gauge
            callbacks = [self._reader(instrument.name)]
            made = create(instrument.name, callbacks=callbacks, unit=instrument.unit, description=instrument.description)
            self._instruments.append(made)
        registry.listen(self._record)

    def _record(self, instrument: Instrument, value: float, attributes: Mapping[str, str]) -> None:
        self._histograms[instrument.name].record(value, {**self._registry.constants(), **attributes})

    def _reader(self, name: str) -> Callable[[Any], Iterator[Any]]:
        from opentelemetry.metrics import Observation

        def read(options: Any) -> Iterator[Any]:
            constants = self._registry.constants()
            for attributes, value in [sample for metric in self._registry.collect(name) for sample in metric.samples]:
                assert not isinstance(value, Distribution)
                yield Observation(value, {**constants, **attributes})

        return read


def _histogram(meter: Any, instrument: Instrument) -> Any:
    about = {"unit": instrument.unit, "description": instrument.description}
    try:
        return meter.create_histogram(instrument.name, explicit_bucket_boundaries_advisory=list(instrument.buckets), **about)
    except TypeError:  # before 1.30, a view of the SDK alone says which buckets there are
        return meter.create_histogram(instrument.name, **about)


def opentelemetry(meter: Any = None) -> Bridge:
    """Makes instruments of the metrics of this process, for all that saves and restores in it. Call it once.

    Histograms hold what comes after that; counters and gauges all.

    Args:
        meter: an `opentelemetry.metrics.Meter`; None: that called "ckpt" of the global provider.

    Raises:
        ImportError: the API of OpenTelemetry is not installed (`pip install 'lazyckpt[opentelemetry]'`).
    """
    from opentelemetry import metrics

    return Bridge(metrics.get_meter("ckpt") if meter is None else meter)
