"""A job as prometheus_client, node_exporter's text file, OpenTelemetry and a logger see it, compared with its own SaveStats."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from kept_records import Kept

import ckpt
from ckpt import metrics
from ckpt.metrics import SaveRecord
from ckpt.metrics.instruments import INSTRUMENTS
from ckpt.metrics.opentelemetry_bridge import Bridge
from ckpt.metrics.prometheus_collector import Collector
from ckpt.metrics.registry import PROCESS

prometheus_client = pytest.importorskip("prometheus_client")
parser = pytest.importorskip("prometheus_client.parser")
DEADLINE_S = 60.0


class Seen(NamedTuple):
    """Of one job: three steps that were committed, one that failed, and a restore."""

    records: list[SaveRecord]
    logged: list[dict[str, float]]
    scraped: dict[str, Any]
    written: dict[str, Any]
    otel: dict[str, Any]
    restored_bytes: int


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    directory = tmp_path_factory.mktemp("job")
    PROCESS._begin()
    PROCESS.rank = 0  # other tests of this process may have been others
    metrics.name_run('a "quoted" run\\with a\nline')
    registry = prometheus_client.CollectorRegistry()
    metrics.prometheus(registry)
    reader, otel = make_reader()
    kept, logged, file = Kept(), [], directory / "ckpt.prom"
    sinks = [kept, metrics.callback(logged.append), metrics.textfile(file)]
    with ckpt.Checkpointer(directory / "run", coordinator="local", metrics=sinks) as checkpointer:
        for step in range(3):
            checkpointer.save(step, {"weight": torch.full((300, 1000), float(step))})
        checkpointer.wait(DEADLINE_S)
        (directory / "run" / "step-000000000003").write_text("in the way")
        assert checkpointer.save(3, {"weight": torch.zeros(3)}).exception(DEADLINE_S) is not None
        damaged = directory / "run" / "step-000000000002" / "state.pt"
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
        found = checkpointer.restore()
        assert found is not None and found.step == 1
        scraped = parse(prometheus_client.generate_latest(registry).decode())
        checkpointer.save(4, {"weight": torch.zeros(3)}).result(DEADLINE_S)
        kept.records.pop()
        logged.pop()
        otel = otel and points(reader.get_metrics_data())
    written = parse(file.read_text())
    size = (directory / "run" / "step-000000000001" / "state.pt").stat().st_size
    PROCESS.run = ""
    yield Seen(kept.records, logged, scraped, written, otel, size)


def make_reader() -> tuple[Any, Any]:
    try:
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    except ImportError:
        return None, {}
    reader = InMemoryMetricReader()
    return reader, Bridge(MeterProvider([reader]).get_meter("ckpt"))


def points(data: Any) -> dict[str, Any]:
    """name -> [(attributes, point)]"""
    (scope,) = [scope for resource in data.resource_metrics for scope in resource.scope_metrics]
    return {metric.name: [(dict(point.attributes), point) for point in metric.data.data_points] for metric in scope.metrics}


def parse(text: str) -> dict[str, Any]:
    """(name, labels but the constant ones) -> value"""
    found = {}
    for family in parser.text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {key: each for key, each in sample.labels.items() if key not in ("run", "rank", "host")}
            assert {"run", "rank", "host"} <= {*sample.labels}, sample
            assert sample.labels["run"] == 'a "quoted" run\\with a\nline' and sample.labels["rank"] == "0"
            found[(sample.name, *sorted(labels.items()))] = sample.value
    return found


def of(found: dict[str, Any], name: str, **labels: str) -> float:
    value: float = found[(name, *sorted(labels.items()))]
    return value


def test_what_is_scraped_is_what_the_saves_say(seen: Seen) -> None:
    found, committed = seen.scraped, [each for each in seen.records if each.outcome == "committed"]
    assert of(found, "ckpt_save_count_total", outcome="committed") == 3 == len(committed)
    assert of(found, "ckpt_save_count_total", outcome="failed") == 1
    blocked = sum(each.stats.save_s for each in seen.records)
    assert of(found, "ckpt_save_blocked_time_seconds_total", where="save") == pytest.approx(blocked)
    for phase, seconds in {
        "blocked": [each.stats.blocked_s for each in seen.records],
        "capture": [each.stats.captured_s for each in committed],
        "flush": [each.stats.flushed_s for each in committed],
        "durable": [each.stats.durable_s for each in committed],
    }.items():
        assert None not in seconds
        assert of(found, "ckpt_save_duration_seconds_sum", phase=phase) == pytest.approx(sum(each or 0 for each in seconds))
        assert of(found, "ckpt_save_duration_seconds_count", phase=phase) == len(seconds)
        assert of(found, "ckpt_save_duration_seconds_bucket", phase=phase, le="+Inf") == len(seconds)
    total = sum(each.stats.bytes_total for each in committed)
    assert of(found, "ckpt_save_size_bytes_sum") == total
    written = [each for key, each in found.items() if key[0] == "ckpt_io_bytes_total" and ("direction", "write") in key]
    assert sum(written) == total


def test_the_last_commit_and_the_restore(seen: Seen) -> None:
    found = seen.scraped
    assert of(found, "ckpt_committed_step", tier="home") == 2
    assert 0 <= time.time() - of(found, "ckpt_committed_timestamp_seconds", tier="home") < 3600
    assert of(found, "ckpt_restore_count_total", outcome="fell_back") == 1
    assert of(found, "ckpt_verify_failures_total", tier="home") == 1
    assert of(found, "ckpt_io_bytes_total", direction="read", source="", tier="home") == seen.restored_bytes
    for phase in ("choose", "read", "load"):
        assert of(found, "ckpt_restore_duration_seconds_count", phase=phase, tier="home") == 1
    assert of(found, "ckpt_in_flight") == 0 and of(found, "ckpt_arena_limit_bytes") >= 512 << 20
    assert of(found, "ckpt_tier_free_bytes", tier="home") > 0
    assert of(found, "ckpt_info", version=ckpt.__version__, torch=torch.__version__) == 1


def test_the_text_file_says_the_same(seen: Seen) -> None:
    assert of(seen.written, "ckpt_save_count_total", outcome="committed") == 4
    assert of(seen.written, "ckpt_committed_step", tier="home") == 4
    changing = ("ckpt_save_", "ckpt_committed_", "ckpt_io_", "ckpt_tier_free", "ckpt_arena")
    same = {key: each for key, each in seen.scraped.items() if not key[0].startswith(changing)}
    assert same and same.items() <= seen.written.items()


def test_opentelemetry_says_the_same(seen: Seen) -> None:
    if not seen.otel:
        pytest.skip("opentelemetry-sdk is not installed")
    constants = {"run": 'a "quoted" run\\with a\nline', "rank": "0", "host": PROCESS.host}
    counts = {attributes["outcome"]: point.value for attributes, point in seen.otel["ckpt.save.count"]}
    assert counts == {"committed": 4, "failed": 1}
    assert all(constants.items() <= attributes.items() for each in seen.otel.values() for attributes, _ in each)
    durable = next(point for attributes, point in seen.otel["ckpt.save.duration"] if attributes["phase"] == "durable")
    assert durable.count == 4 and list(durable.explicit_bounds) == list(INSTRUMENTS["ckpt.save.duration"].buckets)
    assert durable.sum >= sum(each.stats.durable_s or 0 for each in seen.records)
    assert next(point.value for _, point in seen.otel["ckpt.committed.step"]) == 4


def test_a_logger_gets_a_flat_dict_a_save(seen: Seen) -> None:
    assert [each["checkpoint/committed_step"] for each in seen.logged[:3]] == [0, 1, 2]
    for record, logged in zip(seen.records, seen.logged, strict=True):
        assert all(isinstance(value, float) for value in logged.values())
        assert logged["checkpoint/blocked_s"] == record.stats.blocked_s
        assert logged["checkpoint/failed"] == (record.outcome == "failed")
    assert "checkpoint/durable_s" not in seen.logged[3] and "checkpoint/committed_step" not in seen.logged[3]


def test_a_second_collector_is_refused() -> None:
    registry = prometheus_client.CollectorRegistry()
    collector = metrics.prometheus(registry)
    with pytest.raises(ValueError, match="Duplicated"):
        registry.register(Collector())
    registry.unregister(collector)
    metrics.prometheus(registry)


def test_what_node_exporter_would_not_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"reads files called '\*\.prom'"):
        metrics.textfile(tmp_path / "ckpt.txt")
    with pytest.raises(TypeError, match="a function of one dict, not str"):
        metrics.callback("print")  # type: ignore[arg-type]


def test_a_text_file_that_cannot_be_written_fails_no_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "ckpt.prom").mkdir()
    sinks = [metrics.textfile(tmp_path / "ckpt.prom")]
    with ckpt.Checkpointer(tmp_path / "run", coordinator="local", metrics=sinks) as checkpointer:
        checkpointer.save(1, {"weight": torch.zeros(3)}).result(DEADLINE_S)
    assert "TextFileSink failed to note the save" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"run", "ckpt.prom"} and not list((tmp_path / "ckpt.prom").iterdir())
