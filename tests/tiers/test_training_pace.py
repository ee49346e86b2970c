"""What the drain is told of the training: iterations, their median without a drain, and when to pause."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import PYTHONPATH
from support import patience

from ckpt.drain.pacing import AutoRate
from ckpt.storage.pace_file import PaceReader
from ckpt.tiers.pace import TrainingPace


class Training:
    """Iterations that take what is said, while the drain runs or not."""

    def __init__(self, page: Path | None) -> None:
        self.now = 100.0
        self.draining = False
        self.pace = TrainingPace(lambda: self.draining)
        if page is not None:
            self.pace.begin(page)

    def iterate(self, *seconds: float, beat: str = "one") -> None:
        for each in seconds:
            self.now += each
            self.pace.note_fence(self.now, beat)

    def capture(self, seconds: float) -> None:
        with self.pace.capturing(lambda: self.now):
            self.now += seconds


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Training]:
    training = Training(tmp_path / "pace")
    yield training
    training.pace.close()


def test_each_iteration_is_told(training: Training, tmp_path: Path) -> None:
    reader = PaceReader(tmp_path / "pace")
    training.iterate(0.0, 1.0, 2.0)
    page = reader.read()
    assert page is not None and (page.iterations, page.iteration_s, page.median_s) == (2, 2.0, 0.0)
    training.iterate(3.0)
    page = reader.read()
    assert page is not None and (page.iterations, page.iteration_s, page.median_s, page.capturing) == (3, 3.0, 2.0, False)


def test_what_came_before_the_page_counts(tmp_path: Path) -> None:
    training = Training(None)
    training.iterate(0.0, 1.0, 1.0, 1.0)
    training.pace.begin(tmp_path / "pace")
    page = PaceReader(tmp_path / "pace").read()
    assert page is not None and (page.iterations, page.median_s) == (3, 1.0)
    training.pace.close()
    training.pace.close()
    training.iterate(1.0)
    training.capture(1.0)


def test_the_median_is_of_iterations_without_a_drain(training: Training) -> None:
    training.iterate(0.0, *[1.0] * 5)
    training.draining = True
    training.iterate(*[1.5] * 20)
    assert training.pace.median_s == 1.0 and training.pace.iteration_s == 1.5
    training.draining = False
    training.iterate(1.5)  # the drain was there when it began
    assert training.pace.median_s == 1.0
    training.iterate(*[2.0] * 40)
    assert training.pace.median_s == 2.0


def test_a_training_that_has_become_slower_does_not_hold_the_drain_back_for_good(training: Training) -> None:
    training.iterate(0.0, *[1.0] * 5)
    training.draining = True
    training.iterate(*[1.5] * 63, 1.0, *[1.5] * 63)
    assert training.pace.median_s == 1.0
    training.iterate(1.5)
    assert training.pace.median_s == 1.5


def test_captures_pause_the_drain_and_are_no_part_of_the_iteration(training: Training, tmp_path: Path) -> None:
    reader = PaceReader(tmp_path / "pace")
    training.iterate(0.0)
    with training.pace.capturing(lambda: training.now):
        training.now += 1.0
        training.capture(0.5)
        page = reader.read()
        assert page is not None and page.capturing
    page = reader.read()
    assert page is not None and not page.capturing and page.iterations == 0
    training.iterate(2.0)
    page = reader.read()
    assert page is not None and page.iteration_s == 2.0
    with pytest.raises(KeyError), training.pace.capturing(lambda: training.now):
        raise KeyError
    page = reader.read()
    assert page is not None and not page.capturing


def test_one_optimizer_of_several_gives_the_beat(training: Training) -> None:
    for _ in range(5):
        training.iterate(1.0, beat="generator")
        training.iterate(0.25, beat="critic")
    assert training.pace.iterations == 4 and training.pace.iteration_s == training.pace.median_s == 1.25
    training.iterate(*[1.0] * 12, beat="critic")  # the other one is done
    assert training.pace.iterations == 9 and training.pace.iteration_s == 1.0


def test_an_optimizer_for_each_layer_does_not_stop_the_count(training: Training) -> None:
    for _ in range(5):
        for layer in range(50):
            training.iterate(0.125, beat=str(layer))
    assert training.pace.iterations == 4 and training.pace.median_s == 50 * 0.125


def test_the_drain_follows_it(training: Training, tmp_path: Path) -> None:
    reader = PaceReader(tmp_path / "pace")
    rate = AutoRate(reader.read, sleep=lambda seconds: None, clock=lambda: training.now)
    rate.note(1000, 1.0)
    training.iterate(0.0, *[1.0] * 5)
    rate.wait(1)
    assert rate.rate == 250.0, "it begins slowly"
    for _ in range(5 * 8):
        training.iterate(1.0)
        rate.wait(1)
    assert rate.rate is None
    training.draining = True
    training.iterate(1.2)
    rate.wait(1)
    assert rate.rate == 500.0
    for _ in range(5):
        training.iterate(1.0)
        rate.wait(1)
    assert rate.rate == 600.0
    training.capture(0.1)
    rate.wait(1)
    assert rate.rate == 600.0, "the same iteration counts once"


def test_a_forked_child_writes_nothing(training: Training, tmp_path: Path) -> None:
    training.iterate(0.0, 1.0)
    before = (tmp_path / "pace").read_bytes()
    pid = os.fork()
    if pid == 0:
        try:
            training.iterate(1.0, 1.0)
            training.capture(1.0)
            training.pace.close()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (tmp_path / "pace").read_bytes() == before
    training.iterate(1.0)
    assert (tmp_path / "pace").read_bytes() != before


def test_a_page_that_cannot_be_made_is_told_and_harmless(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ckpt"):
        training = Training(tmp_path / "nowhere" / "pace")
    assert len(caplog.records) == 1 and "nowhere" in caplog.text
    training.iterate(1.0, 1.0)
    training.capture(1.0)
    assert training.pace.iterations == 1


def test_noting_costs_microseconds(training: Training) -> None:
    """A hundredth of what would be felt: a mean over many, against a limit that only another kind of work would pass."""
    began = time.process_time()
    for number in range(2000):
        training.pace.note_fence(float(number))
    assert (time.process_time() - began) / 2000 < 1e-3


def test_tiers_need_no_torch() -> None:
    modules = ("tier", "run_id", "node_storage", "drain_process", "home_watch", "pace")
    script = f"import sys, {', '.join(f'ckpt.tiers.{name}' for name in modules)}; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": PYTHONPATH}, timeout=patience(60))
    assert done.returncode == 0
