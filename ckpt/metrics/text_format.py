"""The text format of Prometheus, version 0.0.4, in a file: for the textfile collector of node_exporter."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ckpt.metrics.instruments import COUNTER
from ckpt.metrics.record import SaveRecord
from ckpt.metrics.registry import PROCESS, Distribution, Metric, Registry
from ckpt.storage.log_file import replace_unsynced


def render(metrics: Iterable[Metric], constants: Mapping[str, str]) -> str:
    """
    Args:
        constants: attributes that all series get.
    """
    return "".join(f"{line}\n" for metric in metrics for line in _lines(metric, constants))


def _lines(metric: Metric, constants: Mapping[str, str]) -> Iterator[str]:
    instrument = metric.instrument
    name = instrument.exported + ("_total" if instrument.kind == COUNTER else "")
    yield f"# HELP {name} {instrument.description}"
    yield f"# TYPE {name} {instrument.kind}"
    for attributes, value in metric.samples:
        labels = {**constants, **attributes}
        if not isinstance(value, Distribution):
            yield f"{name}{_labels(labels)} {_number(value)}"
            continue
        for bound, count in zip((*map(_number, value.bounds), "+Inf"), value.cumulative(), strict=True):
            yield f"{name}_bucket{_labels({**labels, 'le': bound})} {count}"
        yield f"{name}_sum{_labels(labels)} {_number(value.sum)}"
        yield f"{name}_count{_labels(labels)} {value.count}"


def _labels(labels: Mapping[str, str]) -> str:
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    return repr(float(value))


class TextFileSink:
    """See textfile()."""

    def __init__(self, path: Path, registry: Registry = PROCESS) -> None:
        self._path = path
        self._registry = registry

    def saved(self, record: SaveRecord) -> None:
        self._write()

    def close(self) -> None:
        """What has changed since the last save ended, as what is in flight."""
        self._write()

    def _write(self) -> None:
        text = render(self._registry.collect(), self._registry.constants())
        replace_unsynced(self._path, text.encode())


def textfile(path: str | os.PathLike[str]) -> TextFileSink:
    """For `metrics=`: writes all metrics of this process to a file whenever a save has ended, and at the end.

    The file is replaced by a rename, so whoever reads it finds it whole. node_exporter reads `*.prom` in the directory of its
    `--collector.textfile.directory`. Each process of a node needs a file of its own, as by its local rank in the name.

    Raises:
        ValueError: the name does not end in ".prom": node_exporter would not read it.
    """
    found = Path(os.path.abspath(os.fspath(path)))
    if found.suffix != ".prom":
        raise ValueError(f"textfile() writes for node_exporter, which reads files called '*.prom'; '{found}' is not")
    return TextFileSink(found)
