"""How fast a drain copies, and when it tries again."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from ckpt.drain.backoff import Backoff, is_permanent
from ckpt.drain.pacing import AutoRate, FixedRate, PaceFile
from ckpt.errors import StorageError
from ckpt.storage.pace_file import Pace, PaceReader, PaceWriter

MiB = 1 << 20


class Time:
    """A clock that only sleep() moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_fixed_rate_is_kept_and_not_saved_up() -> None:
    time = Time()
    rate = FixedRate(10.0, time.sleep, time.clock)
    for _ in range(5):
        rate.wait(20)
    assert time.now == 108.0  # the last 20 take their time afterwards
    time.now += 1000
    rate.wait(20)
    rate.wait(20)
    assert time.now == 1110.0


class Training:
    def __init__(self) -> None:
        self.page: Pace | None = Pace(2, 1.0, 1.0, False, 1)

    def iterate(self, share: float) -> None:
        assert self.page is not None
        self.page = Pace(self.page.counter + 2, share, 1.0, False, self.page.iterations + 1)

    def begin_capture(self) -> None:
        assert self.page is not None
        self.page = self.page._replace(counter=self.page.counter + 2, capturing=True)

    def end_capture(self) -> None:
        assert self.page is not None
        self.page = self.page._replace(counter=self.page.counter + 2, capturing=False)


def make(time: Time) -> tuple[AutoRate, Training]:
    training = Training()
    rate = AutoRate(lambda: training.page, time.sleep, time.clock)
    rate.note(100 * MiB, 1.0)
    rate.wait(1)
    return rate, training


def make_fast(time: Time) -> tuple[AutoRate, Training]:
    """One that has found out that the training does not feel it."""
    rate, training = make(time)
    for _ in range(5 * 8):
        training.iterate(1.0)
        rate.wait(0)
    return rate, training


def test_it_begins_slowly_beside_a_training() -> None:
    """What no iteration has shown yet to be harmless is not done at full speed."""
    rate, training = make(Time())
    found = [rate.rate]
    for _ in range(8):
        for _ in range(5):
            training.iterate(1.0)
            rate.wait(1)
        found.append(rate.rate)
    shares = [0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95]
    assert found == [*(pytest.approx(share * 100 * MiB) for share in shares), None]
    training.page = None
    rate.wait(1)
    assert rate.rate is None
    training.page = Pace(2, 1.0, 1.0, False, 1)  # the next job's
    rate.wait(1)
    assert rate.rate == 25.0 * MiB


def test_the_first_block_of_all_has_no_limit() -> None:
    """Nobody knows yet what the disk can do."""
    training = Training()
    rate = AutoRate(lambda: training.page, Time().sleep, Time().clock)
    rate.wait(1)
    assert rate.rate is None


def test_the_rate_follows_the_training() -> None:
    rate, training = make_fast(Time())
    peak = 100.0 * MiB
    assert rate.peak == peak and rate.rate is None
    found = []
    for share in (1.015, 1.03, 1.03, 1.015, 1.0, 1.0, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1):
        for _ in range(5):
            training.iterate(share)
            rate.wait(1)
        found.append(None if rate.rate is None else rate.rate / peak)
    expected = [None, 0.5, 0.25, 0.25, 0.35, 0.45, 0.225, 0.1125, 0.05625, 0.05, 0.05, 0.05]
    assert found == [None if each is None else pytest.approx(each) for each in expected]
    for _ in range(5 * 12):
        training.iterate(1.0)
        rate.wait(1)
    assert rate.rate is None, "there is no limit any more"


def test_iterations_that_differ_among_themselves_do_not_slow_it_down() -> None:
    rate, training = make_fast(Time())
    for share in (1.05, 0.96, 1.0, 1.04, 0.99) * 4:
        training.iterate(share)
        rate.wait(1)
        assert rate.rate is None


def test_one_that_is_plainly_slower_does_at_once() -> None:
    rate, training = make_fast(Time())
    training.iterate(1.2)
    rate.wait(1)
    assert rate.rate == 50.0 * MiB


def test_nobody_is_slowed_down_where_no_iteration_ends() -> None:
    """As in an evaluation, or when the job waits for its last save."""
    time = Time()
    rate, training = make_fast(time)
    for _ in range(5):
        training.iterate(1.2)
        rate.wait(1)
    assert rate.rate == 5.0 * MiB
    found = [rate.rate]
    for _ in range(30):
        time.now += 3.9
        rate.wait(1)
        found.append(rate.rate)
    assert found[1] == 5.0 * MiB, "an iteration may take a while"
    assert rate.rate is None
    for _ in range(2):
        training.iterate(1.2)
        rate.wait(1)
    assert rate.rate == 25.0 * MiB, "it goes on with the next one"


def test_one_iteration_counts_once() -> None:
    rate, training = make_fast(Time())
    training.iterate(1.5)
    for _ in range(5):
        rate.wait(1)
        training.begin_capture()
        rate.wait(1)
        training.end_capture()
    assert rate.rate == 50.0 * MiB


def test_a_rate_that_was_chosen_is_kept() -> None:
    time = Time()
    rate, training = make_fast(time)
    training.iterate(1.5)
    began = time.now
    for _ in range(5):
        rate.wait(50 * MiB)
    assert time.now - began == pytest.approx(4.0)


def test_it_pauses_while_a_capture_runs_but_not_for_one_that_died() -> None:
    time = Time()
    rate, training = make_fast(time)
    training.begin_capture()
    for _ in range(3):
        rate.wait(1)
    assert 1.0 <= time.now - 100.0 < 1.1, "a second, once"
    training.begin_capture()
    rate.wait(1)
    assert time.now - 100.0 >= 2.0


def test_without_a_training_there_is_no_limit() -> None:
    rate, training = make_fast(Time())
    training.iterate(1.5)
    rate.wait(1)
    training.page = None
    rate.wait(1)
    assert rate.rate is None


def test_the_page_is_read_as_it_was_written(tmp_path: Path) -> None:
    path, trained = tmp_path / "pace", True
    page = PaceFile(path, lambda: trained)
    assert page.read() is None
    with pytest.raises(StorageError):
        PaceReader(path)
    writer = PaceWriter(path)
    assert page.read() is None, "nothing was written yet"
    writer.write(7, 0.5, 0.25, True)
    assert page.read() == (2, 0.5, 0.25, True, 7) and path.stat().st_size == 4096
    writer.write(8, 0.75, 0.25, False)
    assert page.read() == (4, 0.75, 0.25, False, 8)
    writer.close()
    again = PaceWriter(path)
    again.write(0, 1.0, 1.0, False)
    assert page.read() == (6, 1.0, 1.0, False, 0), "the next process goes on"
    again.close()
    trained = False
    assert page.read() is None


def test_a_page_that_is_being_written_is_not_taken(tmp_path: Path) -> None:
    writer = PaceWriter(tmp_path / "pace")
    writer.write(7, 0.5, 0.25, False)
    with (tmp_path / "pace").open("r+b") as file:
        file.seek(8)
        file.write((3).to_bytes(8, "little"))
    assert PaceReader(tmp_path / "pace").read() is None
    writer.close()


def test_attempts_come_at_ever_longer_times() -> None:
    time = Time()
    backoff = Backoff(lambda: 0.5, time.clock)
    assert [backoff.fail() for _ in range(11)] == [0.5, 1, 2, 4, 8, 16, 32, 64, 128, 150, 150]
    assert backoff.waits
    time.now += 151
    assert not backoff.waits
    backoff.succeed()
    assert backoff.fail() == 0.5


def test_one_warning_for_each_doubling() -> None:
    backoff, told = Backoff(), []
    for number in range(1, 40):
        backoff.fail()
        if backoff.is_worth_a_word:
            told.append(number)
    assert told == [1, 2, 4, 8, 16, 32]


def test_what_no_time_heals() -> None:
    assert sorted(filter(is_permanent, errno.errorcode)) == [errno.EPERM, errno.EACCES, errno.EROFS]
