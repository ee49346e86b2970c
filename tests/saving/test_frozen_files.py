"""Frozen tensors in a file of their own, which the saves that follow link rather than write."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from choice import mostly_slow
from frozen_runs import FROZEN, MIB, Run, copy_of, overwritten, small_files_count  # noqa: F401  one is a fixture
from support import DEADLINE_S, as_bytes, assert_same

import ckpt
from ckpt import _native
from ckpt.errors import CaptureError, CorruptError
from ckpt.saving import frozen_file

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with Run(tmp_path) as made:
        yield made


def slowly(*cases: Any) -> list[Any]:
    """For parametrize."""
    return [pytest.param(case, marks=pytest.mark.slow) for case in cases]


FEW = [("state", 12), ("sharded", 5)]


@pytest.mark.parametrize(("kind", "count"), mostly_slow([*FEW, ("sharded", 12)], run=FEW))
def test_generation_after_generation(kind: str, count: int, tmp_path: Path) -> None:
    """It is written once; the loss of any checkpoint does no harm to the others, for readers of torch neither."""
    with Run(tmp_path, kind=kind) as run:
        reused = [run.save() for _ in range(count)]
        assert reused[0] == 0 and all(FROZEN < each < FROZEN + MIB // 8 for each in reused[1:])
    links = [os.stat(run.file(step)) for step in range(count)]
    assert {(found.st_ino, found.st_nlink) for found in links} == {(links[0].st_ino, count)}
    assert stat.S_IMODE(links[0].st_mode) & 0o222 == 0
    order = list(run.saved)
    random.Random(3).shuffle(order)
    while order:
        run.check(order[0])
        shutil.rmtree(run.path(order.pop()))


def test_what_is_written(run: Run) -> None:
    run.save()
    pending = run.begin()
    pending.result(DEADLINE_S)
    learning = run.state["learning"].nbytes
    assert pending.stats.bytes_total - pending.stats.reused_bytes < learning + 4096
    assert os.path.getsize(run.path(1) / "state.pt") < learning + 4096
    entries = json.loads((run.path(1) / "manifest.json").read_text())["files"]
    found = next(entry for entry in entries if entry["kind"] == "frozen")
    assert (found["shared_bytes"], found["shared_step"]) == (found["bytes"], 0)


def test_readers_that_know_of_one_file_get_no_tensor_of_another(run: Run) -> None:
    run.save()
    path = run.path(0) / "state.pt"
    for more in ({}, {"mmap": True}, {"map_location": "meta"}, {"weights_only": False}):
        with pytest.raises(RuntimeError, match="failed locating file data/0"):
            torch.load(path, **more)
    shutil.copy(path, run.directory.parent / "alone.pt")
    with pytest.raises(CorruptError, match=r"frozen.pt' is missing: it holds the frozen tensors"):
        ckpt.load(run.directory.parent / "alone.pt")


def test_it_is_restored_in_all_ways(run: Run) -> None:
    run.save()
    run.save()
    checkpointer, expected = run.checkpointer, run.saved[1]
    assert_same(expected, checkpointer.restore().state)  # type: ignore[union-attr]
    target = copy_of(run.state, torch.zeros_like)
    addresses = [tensor.data_ptr() for tensor in target["frozen"].values()]
    assert_same(expected, checkpointer.restore(into=target).state)  # type: ignore[union-attr]
    assert [tensor.data_ptr() for tensor in target["frozen"].values()] == addresses
    lent = torch.zeros_like(run.frozen["b"])
    found = checkpointer.restore(into=lambda skeleton: {("frozen", "b"): lent})
    assert found is not None and found.state["frozen"]["b"] is lent
    assert_same(expected, found.state)
    turned = copy_of(
        run.state, lambda tensor: torch.zeros(tensor.t().shape).t() if tensor.dim() == 2 else torch.zeros_like(tensor)
    )
    found = checkpointer.restore(into=turned)
    assert found is not None and all(torch.equal(found.state["frozen"][name], expected["frozen"][name]) for name in "abc")
    path = run.path(1)
    assert_same(expected, ckpt.load(path / "state.pt", weights_only=False))
    assert_same({"frozen": {"b": expected["frozen"]["b"]}}, ckpt.load(path, keys=["frozen.b"]))
    target = copy_of(run.state, torch.zeros_like)
    ckpt.load_into(path / "state.pt", target)
    assert_same(expected, target)


# ---- when it is written anew ------------------------------------------------------------------------------------------


def written_into(run: Run) -> None:
    run.frozen["c"].add_(1)


def written_into_by_a_view(run: Run) -> None:
    run.frozen["c"][7:9].detach().zero_()


def other_memory(run: Run) -> None:
    run.frozen["a"] = run.frozen["a"].clone()


def other_memory_of_the_same_tensor(run: Run) -> None:
    run.frozen["a"].data = torch.full_like(run.frozen["a"], 3)


def exchanged(run: Run) -> None:
    """The second is in the place of the first, with as many bytes at the same place of the file."""
    flat = run.frozen["b"].view(-1)
    run.frozen["a"], run.frozen["b"] = flat, run.frozen["a"].view(512, -1)


def another_name(run: Run) -> None:
    run.frozen["d"] = run.frozen.pop("a")


def other_shape(run: Run) -> None:
    run.frozen["b"] = run.frozen["b"].view(256, -1)


def less(run: Run) -> None:
    del run.frozen["a"]


def more(run: Run) -> None:
    run.frozen["d"] = torch.ones(MIB // 4)


def by_numpy(run: Run) -> None:
    """All of it, so that samples tell."""
    run.frozen["c"].numpy()[:] = 5


def behind_its_counter(run: Run) -> None:
    run.frozen["c"].data.add_(1)


FAST = (written_into, other_memory, exchanged, by_numpy)
CHANGES = (
    *FAST,
    written_into_by_a_view,
    other_memory_of_the_same_tensor,
    another_name,
    other_shape,
    less,
    more,
    behind_its_counter,
)


@pytest.mark.parametrize(
    ("kind", "change"),
    mostly_slow([(kind, each) for kind in ("state", "sharded") for each in CHANGES], run=[("state", each) for each in FAST]),
)
def test_what_changes_is_written(kind: str, change: Callable[[Run], None], tmp_path: Path) -> None:
    with Run(tmp_path, kind=kind) as run:
        assert [run.save(), run.save() > FROZEN] == [0, True]
        change(run)
        assert run.save() == 0
        assert run.save() >= 2 * MIB
        run.check(*run.saved)


def test_memory_that_is_used_again(run: Run) -> None:
    """An address, a size and a counter say nothing of the tensor that is there."""
    run.save()
    for _ in range(5):
        version, address = run.frozen["c"]._version, run.frozen["c"].data_ptr()
        del run.frozen["c"]
        run.state["frozen"]["c"] = torch.empty(MIB // 2)
        while run.frozen["c"]._version < version:
            run.frozen["c"].fill_(run.step)
        run.frozen["c"].data.fill_(run.step)
        assert run.save() == 0 or run.frozen["c"].data_ptr() != address


def test_a_hint_that_comes_and_goes(run: Run) -> None:
    assert [run.save(), run.save() > FROZEN, run.save(frozen=None)] == [0, True, 0]
    assert sorted(os.listdir(run.path(2))) == ["manifest.json", "state.pt"]
    assert [run.save(), run.save() > FROZEN] == [0, True]


def test_little_stays_together(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    monkeypatch.setattr(frozen_file, "LEAST_BYTES", FROZEN + 1)
    run.begin().result(DEADLINE_S)
    assert_same(run.saved[0], torch.load(run.path(0) / "state.pt"))


def test_a_change_that_nothing_tells_of_is_found_when_it_is_written_anew(tmp_path: Path) -> None:
    with Run(tmp_path, refresh_every=4) as run:
        for _ in range(2):
            run.save()
        place = unsampled_byte(run.frozen["c"])
        as_bytes(run.frozen["c"])[place] ^= 1
        run.begin().result(DEADLINE_S)
        run.begin().result(DEADLINE_S)
        error = run.begin().exception(DEADLINE_S)
        assert isinstance(error, CaptureError) and "frozen.c" in str(error) and "the 4 checkpoints before" in str(error)
        assert not run.path(4).exists()
        assert run.save() == 0, "it is not believed any more"
        assert 2 * MIB < run.save() < 3 * MIB
        as_bytes(run.frozen["c"])[place] ^= 2
        run.save()


def unsampled_byte(tensor: torch.Tensor) -> int:
    before = sample(tensor)
    flat = as_bytes(tensor)
    for place in range(1000, flat.numel(), 99_991):
        flat[place] ^= 1
        told = sample(tensor) != before
        flat[place] ^= 1
        if not told:
            return place
    raise AssertionError("all of it is looked at")


def sample(tensor: torch.Tensor) -> bytes:
    return _native.sample_records(addresses=[tensor.data_ptr()], sizes=[tensor.nbytes], seed=frozen_file._SEED)


@pytest.mark.parametrize("kind", ["state", pytest.param("sharded", marks=pytest.mark.slow)])
def test_it_is_written_anew_from_time_to_time(kind: str, tmp_path: Path) -> None:
    with Run(tmp_path, kind=kind, refresh_every=3) as run:
        assert [run.save() > 0 for _ in range(8)] == [False, True, True, False, True, True, False, True]


def test_nothing_is_believed_where_captures_are_verified(tmp_path: Path) -> None:
    with Run(tmp_path, verify_capture=True) as run:
        assert [run.save() for _ in range(3)] == [0, 0, 0]


# ---- what may befall the file -----------------------------------------------------------------------------------------


def truncated(path: Path) -> None:
    path.chmod(0o644)
    os.truncate(path, MIB)
    path.chmod(0o444)


def made_writable(path: Path) -> None:
    path.chmod(0o644)


def removed(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("harm", [overwritten, removed, *slowly(truncated, made_writable)])
def test_a_file_that_somebody_has_touched_is_not_linked(harm: Callable[[Path], None], run: Run) -> None:
    run.save()
    harm(run.file(0))
    assert run.save() == 0
    assert run.save() > FROZEN


def test_another_file_in_its_place_is_not_taken_for_it(run: Run) -> None:
    run.save()
    other = run.path(0) / "other"
    other.write_bytes(b"\xff" * run.file(0).stat().st_size)
    run.save()
    other.rename(run.file(0))
    assert run.save() > FROZEN, "what is held has another name left"
    shutil.rmtree(run.path(1))
    shutil.rmtree(run.path(2))
    assert run.save() == 0


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EIO, *slowly(errno.EMLINK, errno.EPERM, errno.ENOENT, errno.EOPNOTSUPP)])
def test_it_is_written_where_it_cannot_be_linked(code: int, run: Run, native: Any) -> None:
    run.save()
    native.set_fault("link", "frozen", error=code)
    assert run.save() == 0
    native.clear_faults()
    assert run.save() > FROZEN


@pytest.mark.parametrize("harm", [overwritten, *slowly(truncated, made_writable)])
def test_harm_between_the_link_and_the_commit(harm: Callable[[Path], None], run: Run, native: Any) -> None:
    run.save()
    native.set_fault("fdatasync", "step-000000000001", delay_s=DEADLINE_S)
    pending = run.begin()
    harm(run.file(0))
    native.clear_faults()
    error = pending.exception(DEADLINE_S)
    assert isinstance(error, CorruptError) and "somebody has written to that" in str(error)
    assert run.save() == 0
    assert run.save() > FROZEN


def test_the_step_with_it_may_go_while_it_is_linked(run: Run, native: Any) -> None:
    run.save()
    native.set_fault("fdatasync", "step-000000000001", delay_s=DEADLINE_S)
    pending = run.begin()
    shutil.rmtree(run.path(0))
    native.clear_faults()
    pending.result(DEADLINE_S)
    run.check(1)


def test_a_save_that_fails_leaves_no_link(run: Run, native: Any) -> None:
    run.save()
    native.set_fault("fdatasync", "step-000000000001", error=errno.EIO)
    assert run.begin().exception(DEADLINE_S) is not None
    native.clear_faults()
    assert os.stat(run.file(0)).st_nlink == 1 and not run.path(1).exists()
    assert run.save() > FROZEN


def test_damage_is_found_and_an_older_one_is_restored(tmp_path: Path) -> None:
    with Run(tmp_path, refresh_every=2) as run:
        for _ in range(4):
            run.save()
        overwritten(run.file(3))
        with pytest.raises(CorruptError, match="frozen"):
            ckpt.load(run.path(3))
        found = run.checkpointer.restore()
        assert found is not None and found.step == 1
        assert_same(run.saved[1], found.state)
        target = copy_of(run.state, torch.zeros_like)
        found = run.checkpointer.restore(into=target)
        assert found is not None and found.step == 1
        assert_same(run.saved[1], target)


def test_a_file_of_another_save_is_refused(run: Run) -> None:
    run.save()
    run.frozen["c"].add_(1)
    run.save()
    shutil.copy(run.path(0) / "state.pt", run.directory.parent / "state.pt")
    shutil.copy(run.file(1), run.directory.parent / "state.frozen.pt")
    with pytest.raises(CorruptError, match="another file than the one"):
        ckpt.load(run.directory.parent / "state.pt")
