"""The metrics of this process for prometheus_client, whenever that is scraped. No server and no port: a program has its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ckpt.metrics.instruments import COUNTER, HISTOGRAM, INSTRUMENTS, Instrument
from ckpt.metrics.registry import PROCESS, Distribution, Metric, Registry


class Collector:
    """As prometheus_client calls it."""

    def __init__(self, registry: Registry = PROCESS) -> None:
        self._registry = registry

    def describe(self) -> Iterator[Any]:
        """All families, without samples: asked for when it is registered, so that names that are taken show then."""
        for instrument in INSTRUMENTS.values():
            yield self._family(instrument)

    def collect(self) -> Iterator[Any]:
        for metric in self._registry.collect():
            yield self._filled(metric)

    def _family(self, instrument: Instrument) -> Any:
        from prometheus_client import core

        kinds = {COUNTER: core.CounterMetricFamily, HISTOGRAM: core.HistogramMetricFamily}
        kind = kinds.get(instrument.kind, core.GaugeMetricFamily)
        labels = [*self._registry.constants(), *instrument.attributes]
        return kind(instrument.exported, instrument.description, labels=labels)

    def _filled(self, metric: Metric) -> Any:
        family, constants = self._family(metric.instrument), list(self._registry.constants().values())
        for attributes, value in metric.samples:
            labels = [*constants, *(attributes[name] for name in metric.instrument.attributes)]
            if isinstance(value, Distribution):
                bounds = [*map(repr, value.bounds), "+Inf"]
                family.add_metric(labels, buckets=list(zip(bounds, value.cumulative(), strict=True)), sum_value=value.sum)
            else:
                family.add_metric(labels, value)
        return family


def prometheus(registry: Any = None) -> Collector:
    """Lets a registry of prometheus_client show the metrics of this process, for all that saves and restores in it.

    Call it once. It starts no server: the program's own does, such as `prometheus_client.start_http_server(port)`.

    Args:
        registry: a `prometheus_client.CollectorRegistry`; None: the default one.

    Returns:
        The collector, for `registry.unregister()`.

    Raises:
        ImportError: prometheus_client is not installed (`pip install 'lazyckpt[prometheus]'`).
        ValueError: the registry has these metrics already.
    """
    import prometheus_client

    collector = Collector()
    (prometheus_client.REGISTRY if registry is None else registry).register(collector)
    return collector
