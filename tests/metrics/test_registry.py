"""Counters, gauges and histograms of a process: exact under threads, empty in a child, and not disturbed by who reads them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from places import PYTHONPATH
from support import patience

from ckpt.metrics.instruments import INSTRUMENTS, SECONDS
from ckpt.metrics.noting import landed_on, note_save
from ckpt.metrics.registry import Distribution, Reading, Registry
from ckpt.metrics.stats import SaveStats


def value(registry: Registry, name: str, **attributes: str) -> float | Distribution | None:
    samples = [sample for metric in registry.collect(name) for sample in metric.samples]
    return next((each.value for each in samples if attributes.items() <= each.attributes.items()), None)


def test_nothing_is_lost_among_threads() -> None:
    registry = Registry()

    def work() -> None:
        for number in range(2000):
            registry.add("ckpt.save.count", outcome="committed")
            registry.observe("ckpt.save.duration", number % 3, phase="durable")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        registry.collect()
    for thread in threads:
        thread.join()
    assert value(registry, "ckpt.save.count", outcome="committed") == 8000
    found = value(registry, "ckpt.save.duration", phase="durable")
    assert isinstance(found, Distribution) and found.count == 8000 and found.sum == 4 * sum(n % 3 for n in range(2000))


def test_a_value_lies_in_the_bucket_whose_bound_it_does_not_exceed() -> None:
    registry = Registry()
    for seconds in (0.0, 0.001, 0.0011, 1800.0, 1801.0):
        registry.observe("ckpt.save.duration", seconds, phase="blocked")
    found = value(registry, "ckpt.save.duration")
    assert isinstance(found, Distribution) and found.bounds == SECONDS
    assert (found.counts[0], found.counts[1], found.counts[-2], found.counts[-1]) == (2, 1, 1, 1)
    assert found.cumulative()[-1] == 5


def test_only_what_the_table_knows() -> None:
    registry = Registry()
    with pytest.raises(KeyError, match="no attribute"):
        registry.add("ckpt.save.count", step="7")
    with pytest.raises(KeyError):
        registry.set("ckpt.anything", 1)
    assert not {"step", "path"} & {name for row in INSTRUMENTS.values() for name in row.attributes}


def test_gauges_of_those_that_are_there() -> None:
    class Drain:
        def gauges(self) -> Iterator[Reading]:
            yield "ckpt.drain.backlog", 5, {"tier": "home"}

    class Broken:
        def gauges(self) -> Iterator[Reading]:
            raise OSError("the disk is gone")

    registry, one, other, broken = Registry(), Drain(), Drain(), Broken()
    for each in (one, other, broken):
        registry.watch(each.gauges)
    assert value(registry, "ckpt.drain.backlog", tier="home") == 10
    del other
    assert value(registry, "ckpt.drain.backlog", tier="home") == 5 and value(registry, "ckpt.info") == 1


CHILD = """
import os, threading
from ckpt.metrics.registry import PROCESS
PROCESS.take_part(3, 4)
PROCESS.add("ckpt.save.count", 7, outcome="committed")
held, go_on = threading.Event(), threading.Event()
def hold():
    with PROCESS._lock:
        held.set()
        go_on.wait()
threading.Thread(target=hold, daemon=True).start()
held.wait()
child = os.fork()
if child == 0:
    before = PROCESS.collect("ckpt.save.count")
    PROCESS.add("ckpt.save.count", outcome="committed")
    PROCESS.take_part(0, 1)
    after = PROCESS.collect("ckpt.save.count")[0].samples[0].value
    os._exit(0 if (before, after, PROCESS.rank) == ([], 1, 0) else 1)
status = os.waitpid(child, 0)[1]
go_on.set()
assert status == 0, status
assert PROCESS.collect("ckpt.save.count")[0].samples[0].value == 7
import sys
assert "torch" not in sys.modules
"""


def test_a_forked_child_begins_with_nothing_though_the_lock_was_held() -> None:
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    done = subprocess.run([sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, timeout=patience(60))
    assert done.returncode == 0, done.stderr


def test_the_bytes_of_a_save_add_up() -> None:
    registry = Registry()
    instants = {"started_at": 1.0, "flushed_at": 2.0, "durable_at": 4.0}
    stats = SaveStats(bytes_total=1000, bytes_from_tensors=600, bytes_from_devices=150, **instants)  # type: ignore[arg-type]
    note_save("committed", stats, registry)
    found = {sample.attributes["source"]: sample.value for sample in registry.collect("ckpt.io")[0].samples}
    assert found == {"tensor": 600, "device": 150, "arena": 250}
    commit = value(registry, "ckpt.save.duration", phase="commit")
    assert isinstance(commit, Distribution) and commit.sum == 2.0
    note_save("failed", stats, registry)
    assert value(registry, "ckpt.save.size") is not None and value(registry, "ckpt.io", source="tensor") == 600


def test_what_was_not_written_is_counted_apart() -> None:
    registry = Registry()
    stats = SaveStats(bytes_total=1000, bytes_from_tensors=600, bytes_from_devices=150, reused_bytes=700)
    note_save("committed", stats, registry)
    found = {sample.attributes["source"]: sample.value for sample in registry.collect("ckpt.io")[0].samples}
    assert found == {"device": 50, "arena": 250}
    assert value(registry, "ckpt.save.reused") == 700


def test_where_a_save_has_landed() -> None:
    assert landed_on(SaveStats(durable_at=5.0)) == "home"
    assert landed_on(SaveStats(durable_at=5.0, tier_at={"node": 3.0})) == "node"
    assert landed_on(SaveStats(durable_at=5.0, tier_at={"node": 5.1})) == "home", "it went past the node"
