"""Two ranks in one process, each a thread, where one is late, gives up, or looks on: nothing wrong is ever published."""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import errno
import gc
import pickletools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import DEADLINE_S, assert_same, options, patience, wait_until

import ckpt
from ckpt.commit import step_target
from ckpt.coordinator import Coordinator, shared_directory
from ckpt.errors import CheckpointError, PeerError, StorageError
from ckpt.plan import pickler
from ckpt.saving import inspection


class Wire:
    """What two ranks have told each other."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.said: dict[tuple[str, int], bytes] = {}
        self.interrupted = False

    def say(self, key: str, rank: int, payload: bytes) -> None:
        with self.changed:
            self.said[key, rank] = payload
            self.changed.notify_all()

    def hear(self, key: str, rank: int, timeout_s: float) -> bytes | None:
        with self.changed:
            self.changed.wait_for(lambda: (key, rank) in self.said or self.interrupted, timeout_s)
            return self.said.get((key, rank))

    def interrupt(self) -> None:
        with self.changed:
            self.interrupted = True
            self.changed.notify_all()


class Threaded(Coordinator):
    name = "test"
    world_size = 2

    def __init__(self, wire: Wire, rank: int) -> None:
        self.wire, self.rank = wire, rank

    def gather(self, key: str, payload: bytes, timeout_s: float) -> list[bytes] | None:
        self.wire.say(key, self.rank, payload)
        if self.rank != 0:
            return None
        other = self.wire.hear(key, 1, timeout_s)
        if other is None:
            raise PeerError("rank 1 did not answer", (1,), {0: payload})
        return [payload, other]

    def broadcast(self, key: str, payload: bytes | None, timeout_s: float) -> bytes:
        if self.rank == 0:
            assert payload is not None
            self.wire.say(f"{key} word", 0, payload)
            return payload
        word = self.wire.hear(f"{key} word", 0, timeout_s)
        if word is None:
            raise PeerError("rank 0 said nothing", (0,))
        return word

    def interrupt(self) -> None:
        self.wire.interrupt()

    def close(self) -> None:
        pass


PATIENT: dict[str, Any] = {"commit_timeout_s": patience(15.0), "timeout_s": patience(15.0)}  # where nobody is missed
IMPATIENT: dict[str, Any] = {"commit_timeout_s": 1.0, "timeout_s": 1.5}


class Pair:
    """Both ranks of a job."""

    def __init__(self, directory: Path, **how: Any) -> None:
        wire = Wire()
        self.directory = directory
        self.ranks = [
            ckpt.Checkpointer(
                directory,
                keep=1,
                options=options(**({"max_failed_saves": 0} | PATIENT | how)),
                coordinator=Threaded(wire, rank),
            )
            for rank in range(2)
        ]

    def save(self, rank: int, step: int) -> ckpt.PendingSave | BaseException:
        try:
            return self.ranks[rank].save(step, {"rank": rank, "step": step}, replicated={"weights": weights(step)})
        except CheckpointError as error:
            return error

    def save_both(self, step: int) -> list[BaseException | None]:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            pending = list(pool.map(lambda rank: self.save(rank, step), range(2)))
        return [each if isinstance(each, BaseException) else each.exception(60) for each in pending]

    def restore_both(self) -> list[Any]:
        def restore(rank: int) -> Any:
            try:
                return self.ranks[rank].restore()
            except CheckpointError as error:
                return error

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            return list(pool.map(restore, range(2)))

    def close(self) -> None:
        for checkpointer in self.ranks:
            with contextlib.suppress(CheckpointError):  # the test has seen what it wanted to see
                checkpointer.close()


def weights(step: int) -> torch.Tensor:
    return torch.full((300_000,), float(step))


@pytest.fixture(params=[PATIENT], ids=[""])
def pair(request: pytest.FixtureRequest, tmp_path: Path, native: Any) -> Any:
    pair = Pair(tmp_path, **request.param)
    yield pair
    native.clear_faults()
    pair.close()


impatient = pytest.mark.parametrize("pair", [IMPATIENT], ids=[""], indirect=True)


def assert_good(pair: Pair, step: int) -> None:
    for rank, found in enumerate(pair.restore_both()):
        assert not isinstance(found, BaseException), found
        assert found.step == step
        assert_same(weights(step), found.replicated["weights"])
        assert found.state == {"rank": rank, "step": step}


@impatient
def test_rank_0_comes_after_rank_1_has_given_up(pair: Pair) -> None:
    """It finds the answer of rank 1, but what it publishes, if anything, must be whole."""
    assert pair.save_both(1) == [None, None]
    late = pair.save(1, 2)
    assert isinstance(late, ckpt.PendingSave)
    error = late.exception(20)
    assert isinstance(error, PeerError) and error.ranks == (0,)
    now = pair.save(0, 2)
    assert isinstance(now, ckpt.PendingSave)
    assert_good(pair, 2 if now.exception(20) is None else 1)
    assert pair.save_both(3) == [None, None]
    assert_good(pair, 3)


@impatient
def test_a_step_is_tried_again_while_the_first_try_may_still_be_published(pair: Pair, native: Any) -> None:
    assert pair.save_both(1) == [None, None]
    native.set_fault("write", path_part="manifest", delay_s=4.0, count=1)
    first = [pair.save(rank, 5) for rank in range(2)]
    assert isinstance(first[1], ckpt.PendingSave) and isinstance(first[1].exception(20), PeerError), "rank 1 has given up"
    second = [pair.save(rank, 5) for rank in range(2)]
    for each in [*first, *second]:
        assert isinstance(each, ckpt.PendingSave)
        each.exception(20)
    assert_good(pair, 5)


def test_a_missed_claim_is_said_again(tmp_path: Path, native: Any) -> None:
    pair = Pair(tmp_path, **IMPATIENT)
    missed = pair.save(1, 0)
    assert isinstance(missed, PeerError)
    assert isinstance(pair.save(0, 0), ckpt.PendingSave)
    assert pair.save_both(1) == [None, None]
    assert_good(pair, 1)
    pair.close()


@impatient
def test_restore_is_in_step_again_after_one_has_failed(pair: Pair) -> None:
    assert pair.save_both(1) == [None, None]
    for rank in range(2):
        with pytest.raises(PeerError):
            pair.ranks[rank].restore()
    assert_good(pair, 1)


def test_a_restore_that_one_rank_cannot_mean_counts_all_the_same(pair: Pair) -> None:
    assert pair.save_both(1) == [None, None]
    with pytest.raises(ValueError, match="step"):
        pair.ranks[0].restore(step=-1)
    with pytest.raises(ValueError, match="merge"):
        pair.ranks[1].restore(into={}, merge=lambda states: states)
    assert [found.step for found in pair.restore_both()] == [1, 1]


def test_one_that_only_looks_does_not_put_the_others_out_of_step(pair: Pair) -> None:
    with ckpt.Checkpointer(pair.directory, coordinator="local"):
        assert pair.save_both(1) == [None, None]


def test_the_log_names_a_save_that_failed_once(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    """Also where its error does so itself."""
    apart = [pair.save(rank, step=3 + rank) for rank in range(2)]
    assert all(isinstance(each, ckpt.PendingSave) and each.exception(DEADLINE_S) for each in apart)
    wait_until(lambda: len(caplog.records) >= 2)
    told = [record.getMessage() for record in caplog.records]
    assert all(text.startswith("the save of step ") and text.count("the save ") == 1 for text in told), told


def test_a_rank_that_gives_nothing_fails_the_save_on_all(pair: Pair) -> None:
    for rank, step in ((0, 1), (1, 2)):
        other = pair.ranks[1 - rank].save(step, {"a": 1}) if rank else None
        with pytest.raises(TypeError, match="nothing to save"):
            pair.ranks[rank].save(step)
        other = other or pair.ranks[1 - rank].save(step, {"a": 1})
        error = other.exception(DEADLINE_S)
        assert isinstance(error, PeerError) and error.ranks == (rank,) and "nothing to save" in str(error)


def test_metrics_that_are_none_on_rank_0_fail_the_first_save_on_all(pair: Pair) -> None:
    """The others wait for rank 0 to claim the directory, and then for its word."""
    with pytest.raises(TypeError, match="'loss' must be a number"):
        pair.ranks[0].save(1, {"a": 1}, metrics={"loss": "low"})
    error = pair.ranks[1].save(1, {"a": 1}).exception(DEADLINE_S)
    assert isinstance(error, PeerError) and error.ranks == (0,) and "'loss' must be a number" in str(error)
    assert pair.save_both(2) == [None, None]


def test_an_error_without_ranks_is_a_failure(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pair.save_both(1) == [None, None]

    def gather(key: str, payload: bytes, timeout_s: float) -> None:
        raise PeerError("the network is down")

    monkeypatch.setattr(inspection.coordinator_of(pair.ranks[0]), "gather", gather)
    errors = pair.save_both(2)
    assert "the network is down" in str(errors[0]) and isinstance(errors[1], CheckpointError)
    monkeypatch.undo()
    assert_good(pair, 1)


def test_nothing_is_published_after_close(tmp_path: Path, native: Any) -> None:
    pair = Pair(tmp_path, commit_timeout_s=6.0, drain_timeout_s=0.3)
    assert pair.save_both(1) == [None, None]
    stuck = pair.save(0, 2)  # waits for rank 1
    with pytest.raises(CheckpointError):
        pair.ranks[0].close()
    late = pair.save(1, 2)
    assert isinstance(stuck, ckpt.PendingSave) and isinstance(late, ckpt.PendingSave)
    assert stuck.exception(30) is not None and late.exception(30) is not None
    with ckpt.Checkpointer(tmp_path, coordinator="local") as checkpointer:
        assert checkpointer.steps() == [1]
    pair.close()


def test_a_slow_rank_holds_up_nobody_else(tmp_path: Path, native: Any) -> None:
    """Neither a save of one file on the same engine, nor another job's, even if its ranks save in another order."""
    one, other = (Pair(tmp_path / name, commit_timeout_s=DEADLINE_S, timeout_s=DEADLINE_S) for name in ("one", "other"))
    for pair in (one, other):
        assert pair.save_both(1) == [None, None]
    stuck = [one.save(0, 2), other.save(1, 2)]
    ckpt.save({"weights": weights(1)}, tmp_path / "alone.pt", options=one.ranks[0].options).result(DEADLINE_S)
    with ckpt.Checkpointer(tmp_path / "alone", options=one.ranks[0].options, coordinator="local") as alone:
        for step in range(3):
            alone.save(step, {"weights": weights(1)}).result(DEADLINE_S)
    assert not any(each.done() for each in stuck if isinstance(each, ckpt.PendingSave))
    stuck += [other.save(0, 2), one.save(1, 2)]
    assert [each.exception(20) for each in stuck if isinstance(each, ckpt.PendingSave)] == [None] * 4
    for pair in (one, other):
        assert_good(pair, 2)
        pair.close()


def test_close_waits_no_longer_for_a_rank_than_it_may(tmp_path: Path, native: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ckpt.checkpointer, "make_coordinator", lambda given, directory: copy.copy(given))  # so that it is owned
    pair = Pair(tmp_path, commit_timeout_s=1000.0, timeout_s=1000.0, drain_timeout_s=0.5)
    assert pair.save_both(1) == [None, None]
    stuck = pair.save(0, 2)
    begin = time.monotonic()
    with pytest.raises(CheckpointError):
        pair.ranks[0].close()
    assert time.monotonic() - begin < patience(10), "not the quarter of an hour for which it waits for an answer"
    assert isinstance(stuck, ckpt.PendingSave) and stuck.exception(0) is not None
    pair.close()


def test_a_step_that_stands_is_not_taken_apart(pair: Pair, native: Any) -> None:
    """When `latest` cannot be moved, the step is a checkpoint all the same."""
    assert pair.save_both(1) == [None, None]
    native.set_fault("rename", path_part="latest", count=1, error=errno.EIO)
    errors = pair.save_both(2)
    assert isinstance(errors[0], StorageError) and isinstance(errors[1], PeerError)
    assert "it is a checkpoint" in str(errors[1])
    assert_good(pair, 2)
    assert pair.save_both(3) == [None, None]
    assert_good(pair, 3)


@impatient
def test_a_rank_whose_word_is_not_delivered_removes_its_files(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pair.save_both(1) == [None, None]

    heard = threading.Event()
    share_of = step_target.share_of

    def gather(key: str, payload: bytes, timeout_s: float) -> None:
        raise StorageError(errno.ENOSPC, "the disk is full", "somewhere")

    def share_once_the_other_has_ended(file: Any) -> Any:
        assert file.write_share.index == 1 or heard.wait(60)
        return share_of(file)

    monkeypatch.setattr(inspection.coordinator_of(pair.ranks[1]), "gather", gather)
    monkeypatch.setattr(step_target, "share_of", share_once_the_other_has_ended)
    one, other = (pair.save(rank, 2) for rank in range(2))
    assert isinstance(one, ckpt.PendingSave) and isinstance(other, ckpt.PendingSave)
    assert isinstance(other.exception(60), StorageError)
    heard.set()
    error = one.exception(60)
    assert isinstance(error, PeerError) and error.ranks == (1,), "what failed is the other rank, not the file of both"
    left = list((pair.directory / "step-000000000002").iterdir())
    assert all(path.name.startswith(".tmp-manifest.json-") and not path.stat().st_size for path in left), "but for the mark"
    monkeypatch.undo()
    assert_good(pair, 1)


def test_what_is_not_ours_stays(tmp_path: Path, native: Any) -> None:
    (tmp_path / ".tmp-mine").mkdir()
    (tmp_path / ".tmp-note").write_text("mine")
    with ckpt.Checkpointer(tmp_path, options=options()) as checkpointer:
        checkpointer.save(1, {}).result(DEADLINE_S)
    assert (tmp_path / ".tmp-mine").is_dir() and (tmp_path / ".tmp-note").read_text() == "mine"


def test_a_finished_save_is_no_cycle(tmp_path: Path, native: Any) -> None:
    """Large trainings switch the cyclic collector off."""
    with ckpt.Checkpointer(tmp_path, options=options()) as checkpointer:
        checkpointer.save(0, {}).result(DEADLINE_S)
        gc.collect()
        gc.disable()
        try:
            for step in range(1, 6):
                checkpointer.save(step, {"weights": torch.ones(10)}).result(DEADLINE_S)
                time.sleep(0.05)
            alive = [each for each in gc.get_objects() if type(each) is ckpt.PendingSave]
        finally:
            gc.enable()
    assert len(alive) <= 2


def test_a_job_that_looks_leaves_the_messages_of_another_alone(tmp_path: Path, native: Any) -> None:
    living = tmp_path / "s-living"
    living.mkdir()
    dead = tmp_path / "s-dead"
    dead.mkdir()
    lock = shared_directory.DirectoryLock(living)
    lock.acquire()
    for session in (living, dead):
        shared_directory._remove_if_dead(session)
    assert living.is_dir() and not dead.exists()
    lock.release()


def test_values_replaced_while_they_are_pickled(native: Any) -> None:
    """The address of one that is gone may be that of another: it must not be taken for the first."""
    state: dict[str, Any] = {"log": [["first"]], "weights": torch.nn.Parameter(torch.ones(3)), "more": []}

    class Replace(torch.overrides.TorchFunctionMode):  # runs in the middle of the pickling
        def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__name__", "") == "detach" and not state["more"]:
                state["log"].clear()
                state["more"].extend(["second"] for _ in range(50))
            return func(*args, **(kwargs or {}))

    with Replace():
        data, _ = pickler.dump(state, {})
    appended = sum(opcode.name == "EMPTY_LIST" for opcode, _, _ in pickletools.genops(data))
    assert appended == 2 + 1 + 50, "each list is one of its own"
