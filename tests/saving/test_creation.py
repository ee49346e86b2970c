"""Files and directories are created in the background: where thousands of ranks do so at once, it takes long."""

from __future__ import annotations

import _thread
import concurrent.futures
import errno
import shutil
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import DEADLINE_S, assert_same, clear_faults, options, somebody_is_in, wait_until
from test_ranks_apart import IMPATIENT, PATIENT, Pair, Threaded, Wire

import ckpt
from ckpt.directory import manifest as manifests
from ckpt.errors import CheckpointError, PeerError, SkippedError, StorageError
from ckpt.saving import inspection

WEIGHTS = torch.arange(300_000)
SMALL = options(arena_bytes="32MiB", chunk_bytes="64KiB")  # holds all that is in flight


def state(step: int) -> dict[str, Any]:
    return {"weights": WEIGHTS + step, "step": step}


def step_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:012d}"


@pytest.fixture
def begun(tmp_path: Path) -> Iterator[ckpt.Checkpointer]:
    """Has saved step 1."""
    with ckpt.Checkpointer(tmp_path, options=SMALL) as checkpointer:
        checkpointer.save(1, state(1)).result(DEADLINE_S)
        yield checkpointer


@pytest.mark.parametrize("call", ["mkdir", "open"])
def test_save_does_not_wait_for_the_file_system(call: str, begun: ckpt.Checkpointer, tmp_path: Path, native: Any) -> None:
    native.set_fault(call, step_path(tmp_path, 2).name, delay_s=DEADLINE_S)
    pending = begun.save(2, state(2))
    ckpt.fence()
    assert not pending.done()
    assert list(tmp_path.glob("step-*2/*")) == []
    native.clear_faults(call)
    assert pending.result(DEADLINE_S) == step_path(tmp_path, 2)
    found = begun.restore()
    assert found is not None
    assert_same(state(2), found.state)


@pytest.mark.parametrize("call", ["mkdir", "open"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES], ids=errno.errorcode.get)
def test_an_error_there_is_the_result(call: str, code: int, begun: ckpt.Checkpointer, tmp_path: Path, native: Any) -> None:
    native.set_fault(call, step_path(tmp_path, 2).name, error=code)
    error = begun.save(2, state(2)).exception(DEADLINE_S)
    assert isinstance(error, StorageError)
    assert error.errno == code and step_path(tmp_path, 2).name in str(error.filename)
    clear_faults()
    assert begun.steps() == [1] and not step_path(tmp_path, 2).exists()
    begun.save(2, state(2)).result(DEADLINE_S)
    with pytest.raises(StorageError):
        begun.wait()
    assert begun.steps() == [1, 2]


@pytest.mark.parametrize(
    ("before", "after", "direct"),
    [((512, 512), (4096, 4096), False), ((4096, 4096), (512, 512), True), ((512, 512), (512, 512), True)],
)
def test_the_file_system_demands_something_else(
    before: tuple[int, int],
    after: tuple[int, int],
    direct: bool,
    tmp_path: Path,
    native: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Than it did for the file before: by what it is laid out for, not by what would be best."""
    inspection.forget_notices()
    native.override_io_limits(*before)
    with ckpt.Checkpointer(tmp_path, options=SMALL) as checkpointer:
        for step in (1, 2, 3):
            pending = checkpointer.save(step, state(step))
            pending.result(DEADLINE_S)
            assert pending.stats.direct_io is (direct or step != 2)
            assert inspection.files_of(pending)[0].job.limits == (before if step == 1 else after)
            assert_same(state(step), torch.load(step_path(tmp_path, step) / "state.pt"))
            native.override_io_limits(*after)
    assert caplog.text == "", "there is direct I/O"


def test_through_the_page_cache_too(tmp_path: Path, native: Any) -> None:
    with ckpt.Checkpointer(tmp_path, options=options(direct_io=False)) as checkpointer:
        checkpointer.save(1, state(1)).result(DEADLINE_S)
        native.set_fault("open", "step-000000000002", delay_s=DEADLINE_S)
        pending = checkpointer.save(2, state(2))
        assert not step_path(tmp_path, 2).exists(), "save() has returned before the file was opened"
        clear_faults()
        pending.result(DEADLINE_S)
        assert pending.stats.direct_io is False
        assert_same(state(2), torch.load(step_path(tmp_path, 2) / "state.pt"))


def test_a_checkpoint_that_appears_meanwhile_is_not_replaced(begun: ckpt.Checkpointer, tmp_path: Path, native: Any) -> None:
    native.set_fault("mkdir", str(step_path(tmp_path, 2)), delay_s=DEADLINE_S)
    pending = begun.save(2, state(2))
    theirs = step_path(tmp_path, 2)
    with ckpt.Checkpointer(tmp_path / "elsewhere", options=SMALL) as other:
        other.save(2, state(7)).result(DEADLINE_S).rename(theirs)
    clear_faults()
    error = pending.exception(DEADLINE_S)
    assert isinstance(error, CheckpointError) and "was put there from elsewhere" in str(error)
    assert_same(state(7), torch.load(theirs / "state.pt"))
    assert sorted(path.name for path in theirs.iterdir()) == ["manifest.json", "state.pt"]
    begun.save(2, state(8)).result(DEADLINE_S)
    assert manifests.names(manifests.read(theirs).files) == {"state-2.pt"}
    with pytest.raises(CheckpointError):
        begun.wait()


def test_steps_below_the_highest_are_looked_at(begun: ckpt.Checkpointer, tmp_path: Path) -> None:
    """Those of an earlier run, too."""
    begun.save(9, state(9)).result(DEADLINE_S)
    begun.close()
    with ckpt.Checkpointer(tmp_path, keep=None, options=SMALL) as checkpointer:
        checkpointer.restore()
        for step in (4, 9, 5, 9, 1):
            checkpointer.save(step, state(step + 100)).result(DEADLINE_S)
            found = checkpointer.restore()
            assert found is not None and found.step == step
            assert_same(state(step + 100), found.state)
        assert checkpointer.steps() == [1, 4, 5, 9]
    assert [len(list(path.iterdir())) for path in sorted(tmp_path.glob("step-*"))] == [2, 2, 2, 2]


def test_two_saves_of_one_new_step(begun: ckpt.Checkpointer, tmp_path: Path, native: Any) -> None:
    native.set_fault("mkdir", step_path(tmp_path, 2).name, delay_s=DEADLINE_S, count=1)
    first = begun.save(2, state(2))
    second = begun.save(2, state(3))
    clear_faults()
    first.result(DEADLINE_S)
    second.result(DEADLINE_S)
    found = begun.restore()
    assert found is not None
    assert_same(state(3), found.state)


def test_a_removed_directory_is_made_again(begun: ckpt.Checkpointer, tmp_path: Path, native: Any) -> None:
    """A step that is saved again has one when it begins; its file makes it again, whoever has removed it in between."""
    native.set_fault("open", ".tmp-state", delay_s=DEADLINE_S, count=1)
    pending = begun.save(1, state(10))
    shutil.rmtree(step_path(tmp_path, 1))
    clear_faults()
    pending.result(DEADLINE_S)
    found = begun.restore()
    assert found is not None
    assert_same(state(10), found.state)


def test_save_does_not_wait_for_the_removal_of_another_step(tmp_path: Path, native: Any) -> None:
    with ckpt.Checkpointer(tmp_path, keep=1, options=SMALL) as checkpointer:
        checkpointer.save(1, state(1)).result(DEADLINE_S)
        native.set_fault("rename", ".tmp-step-000000000001", delay_s=DEADLINE_S)
        second = checkpointer.save(2, state(2))
        wait_until(lambda: somebody_is_in("retire_directory"))
        third = checkpointer.save(3, state(3))
        assert not second.done() and step_path(tmp_path, 1).exists()
        clear_faults()
        second.result(DEADLINE_S)
        third.result(DEADLINE_S)
        assert checkpointer.steps() == [3]


def test_a_step_that_is_being_removed_is_saved_again(tmp_path: Path, native: Any) -> None:
    """It waits for that: the files must not go with the directory."""
    with ckpt.Checkpointer(tmp_path, keep=1, options=SMALL) as checkpointer:
        checkpointer.save(1, state(1)).result(DEADLINE_S)
        native.set_fault("rename", ".tmp-step-000000000001", delay_s=DEADLINE_S)
        second = checkpointer.save(2, state(2))
        wait_until(lambda: "step-000000000001" in inspection.being_removed(checkpointer))
        saved: list[ckpt.PendingSave] = []
        thread = threading.Thread(target=lambda: saved.append(checkpointer.save(1, state(10))))
        thread.start()
        thread.join(0.2)
        assert not saved and not second.done()
        clear_faults()
        thread.join(DEADLINE_S)
        saved[0].result(DEADLINE_S)
        found = checkpointer.restore()
        assert found is not None and found.step == 1
        assert_same(state(10), found.state)


def test_what_was_given_up_makes_nothing_later(tmp_path: Path, native: Any) -> None:
    """The directory may belong to another job by then."""
    checkpointer = ckpt.Checkpointer(tmp_path, options=options(arena_bytes="32MiB", drain_timeout_s=0.5))
    checkpointer.save(1, state(1)).result(DEADLINE_S)
    native.set_fault("mkdir", step_path(tmp_path, 2).name, delay_s=DEADLINE_S)
    pending = checkpointer.save(2, state(2))
    with pytest.raises(CheckpointError):
        checkpointer.close()
    clear_faults()
    wait_until(lambda: inspection.files_of(pending)[0].job.finished)
    assert sorted(path.name for path in tmp_path.glob("*step*")) == ["step-000000000001"]


def test_an_interrupted_save_leaves_nothing(begun: ckpt.Checkpointer, tmp_path: Path, native: Any) -> None:
    native.set_fault("open", step_path(tmp_path, 2).name, delay_s=DEADLINE_S)

    def interrupt() -> None:
        wait_until(lambda: somebody_is_in("submit"))
        _thread.interrupt_main()

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        begun.save(2, {"more than the arena": torch.zeros(10 << 20)})
    thread.join()
    clear_faults()
    begun.save(3, state(3)).result(DEADLINE_S)
    begun.close()
    assert sorted(path.name for path in tmp_path.glob("*step*")) == ["step-000000000001", "step-000000000003"]


def save_on_both(pair: Pair, step: int) -> list[ckpt.PendingSave]:
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(
            pool.map(lambda rank: pair.ranks[rank].save(step, {"rank": rank}, replicated=state(step), lazy=True), range(2))
        )


def outcomes(saves: list[ckpt.PendingSave]) -> list[BaseException | None]:
    return [pending.exception(DEADLINE_S) for pending in saves]


def unfinished(directory: Path) -> list[str]:
    return [path.name for path in directory.glob("step-*/.tmp-*")]


def test_a_share_that_comes_too_late_is_removed(tmp_path: Path, native: Any) -> None:
    """Rank 0 has given up, and removed the file, before rank 1 makes it anew."""
    with closing(Pair(tmp_path, writers=1, arena_bytes="32MiB", **IMPATIENT)) as pair:
        assert outcomes(save_on_both(pair, 1)) == [None, None]
        first = pair.ranks[0].save(2, {"rank": 0}, replicated=state(2))
        wait_until(lambda: all(file.job.finished for file in inspection.files_of(first)))
        native.set_fault("pwritev", "rank-00001", delay_s=DEADLINE_S)
        second = pair.ranks[1].save(2, {"rank": 1}, replicated=state(2))
        assert isinstance(first.exception(DEADLINE_S), PeerError)
        assert not [name for name in unfinished(tmp_path) if "replicated" in name]
        clear_faults()
        assert isinstance(second.exception(DEADLINE_S), CheckpointError)
        assert unfinished(tmp_path) == []


class Lingering(Threaded):
    """Rank 0 is busy until it is told not to be, while the others know the outcome."""

    def __init__(self, wire: Wire, rank: int) -> None:
        super().__init__(wire, rank)
        self.go_on = threading.Event()
        self.go_on.set()

    def broadcast(self, key: str, payload: bytes | None, timeout_s: float) -> bytes:
        said = super().broadcast(key, payload, timeout_s)
        self.go_on.wait(DEADLINE_S)
        return said


def test_what_others_wrote_is_removed_when_rank_0_skips(tmp_path: Path) -> None:
    wire = Wire()
    lingering = Lingering(wire, 0)
    how = options(when_busy="skip", max_in_flight=1, **PATIENT)
    ranks = [ckpt.Checkpointer(tmp_path, options=how, coordinator=each) for each in (lingering, Threaded(wire, 1))]
    pair = SimpleNamespace(ranks=ranks)
    assert outcomes(save_on_both(pair, 1)) == [None, None]
    wait_until(lambda: all(inspection.is_idle(rank) for rank in ranks))
    lingering.go_on.clear()
    busy = save_on_both(pair, 2)
    busy[1].result(DEADLINE_S)
    wait_until(lambda: inspection.is_idle(ranks[1]))
    skipped = save_on_both(pair, 3)
    assert isinstance(skipped[0].exception(DEADLINE_S), SkippedError)
    lingering.go_on.set()
    assert isinstance(skipped[1].exception(DEADLINE_S), CheckpointError)
    assert outcomes(save_on_both(pair, 4)) == [None, None]
    for rank in ranks:
        rank.close()
    assert unfinished(tmp_path) == []


def test_a_rank_that_writes_nothing_touches_nothing(tmp_path: Path, native: Any) -> None:
    with closing(Pair(tmp_path, replicated_writers="rank0", **PATIENT)) as pair:
        for step in (1, 2):
            with concurrent.futures.ThreadPoolExecutor(2) as pool:
                saves = list(pool.map(lambda rank, step=step: pair.ranks[rank].save(step, replicated=state(step)), range(2)))
            assert outcomes(saves) == [None, None]
        tmp_path.rename(tmp_path.with_name("away"))
        try:
            pending = pair.ranks[1].save(1, replicated=state(3))
            assert not pending.done() and not tmp_path.exists()
        finally:
            tmp_path.with_name("away").rename(tmp_path)
        pair.ranks[0].save(1, replicated=state(3)).result(DEADLINE_S)
        pending.result(DEADLINE_S)


def test_ranks_may_have_found_different_limits(tmp_path: Path, native: Any) -> None:
    """The file that they write together has the same layout for all of them."""
    native.override_io_limits(512, 512)
    with closing(Pair(tmp_path, arena_bytes="32MiB", **PATIENT)) as pair:
        assert outcomes(save_on_both(pair, 1)) == [None, None]
        native.set_fault("fcntl", ".tmp-replicated", error=errno.EINVAL, count=1)
        for step in (2, 3, 4):
            assert outcomes(save_on_both(pair, step)) == [None, None]
            assert_same(state(step), torch.load(step_path(tmp_path, step) / "replicated.pt"))
            if step == 2:
                assert {inspection.known_limits(rank) for rank in pair.ranks} == {(1, 1), (512, 512)}


class TestBundles:
    def save(self, checkpointer: ckpt.BundleCheckpointer, root: Path, name: str) -> ckpt.PendingSave:
        bundle = checkpointer.begin(root, name)
        bundle.save(state(1), root / name / "model.pt")
        return bundle.commit()

    def test_save_does_not_wait_for_the_open(self, tmp_path: Path, native: Any) -> None:
        with ckpt.BundleCheckpointer(options=SMALL, coordinator="local") as checkpointer:
            self.save(checkpointer, tmp_path, "a").result(DEADLINE_S)
            native.set_fault("open", "/b/", delay_s=DEADLINE_S)
            pending = self.save(checkpointer, tmp_path, "b")
            assert list((tmp_path / "b").iterdir()) == []
            clear_faults()
            pending.result(DEADLINE_S)
            assert_same(state(1), torch.load(tmp_path / "b" / "model.pt"))

    def test_what_was_found_is_of_one_root(self, tmp_path: Path, native: Any) -> None:
        """The other may lie on another file system: there, the file is created and looked at before anything is laid out."""
        with ckpt.BundleCheckpointer(options=SMALL, coordinator="local") as checkpointer:
            self.save(checkpointer, tmp_path / "one", "a").result(DEADLINE_S)
            native.set_fault("open", "/a/.tmp-model", delay_s=DEADLINE_S)
            saved: list[ckpt.PendingSave] = []
            thread = threading.Thread(target=lambda: saved.append(self.save(checkpointer, tmp_path / "two", "a")))
            thread.start()
            wait_until(lambda: (tmp_path / "two" / "a").exists())
            thread.join(0.2)
            assert thread.is_alive() and not saved
            clear_faults()
            thread.join(DEADLINE_S)
            saved[0].result(DEADLINE_S)
