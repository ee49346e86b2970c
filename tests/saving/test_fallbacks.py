"""File systems, sizes and options at the edges: every one gives a right file, and the statistics say how it came about."""

from __future__ import annotations

import errno
import logging
import os
import signal
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import DEADLINE_S, as_bytes, assert_same, options, wait_until

import ckpt
from ckpt.errors import DeadlineError, SkippedError, StorageError
from ckpt.saving import inspection

MIB = 1 << 20


def random_bytes(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8)


def some_state() -> list[torch.Tensor]:
    return [random_bytes(size) for size in (3 * MIB + 17, 5, 0, 300_000, 64 * 1024, 2 * MIB)]


def check(pending: ckpt.PendingSave, expected: Any) -> ckpt.SaveStats:
    """The file is right, by zipfile's reading too, and the statistics agree with it."""
    path = pending.result(DEADLINE_S)
    assert_same(expected, ckpt.load(path))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    stats = pending.stats
    assert stats.bytes_total == path.stat().st_size
    written = stats.bytes_from_tensors + stats.bytes_copied_in_save + stats.bytes_copied_at_fence
    written += inspection.files_of(pending)[0].job.stats["bytes_of_structure"]  # that writers took from where it was laid out
    assert stats.bytes_total <= written < stats.bytes_total + 32768  # up to the end of the last block
    return stats


def save(state: Any, path: Path, **how: Any) -> ckpt.PendingSave:
    return ckpt.save(state, path, lazy=True, options=options(**how))


@pytest.fixture
def direct(tmp_path: Path) -> Path:
    """A directory with direct I/O."""
    pending = save([random_bytes(MIB)], tmp_path / "probe.pt")
    pending.result(DEADLINE_S).unlink()
    if not pending.stats.direct_io:
        pytest.skip("the directory for temporary files has no direct I/O")
    return tmp_path


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A directory on a file system without direct I/O."""
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("there is no writable /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


# ---- direct I/O ------------------------------------------------------------------------------------------------------


def test_direct_io_where_there_is_some(direct: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = some_state()
    stats = check(save(state, direct / "x.pt"), state)
    assert stats.direct_io is True and stats.bytes_from_tensors > 5 * MIB
    assert caplog.records == []


@pytest.mark.parametrize("fenced", [False, True])
def test_of_large_tensors_nothing_is_copied_inside_save(direct: Path, native: Any, fenced: bool) -> None:
    """Wherever they begin and end: neither their edges, nor the headers and the padding around them."""
    block = random_bytes(8 * MIB)
    large = [block[at : at + size] for at, size in ((3, 3 * MIB + 17), (4 * MIB + 1, 70_001), (5 * MIB, MIB))]
    small = [random_bytes(size) for size in (5, 0, 3000)]
    state = [large[0], small[0], large[1], *small[1:], large[2]]
    expected = [tensor.clone() for tensor in state]
    native.set_fault("fallocate", delay_s=DEADLINE_S if fenced else 0.0)
    pending = save(state, direct / "x.pt")
    if fenced:
        ckpt.fence()
        for tensor in state:
            as_bytes(tensor).zero_()
    native.clear_faults()
    stats, lazy = check(pending, expected), sum(tensor.nbytes for tensor in large)
    assert stats.direct_io is True
    assert (stats.bytes_from_tensors, stats.bytes_copied_at_fence) == ((0, lazy) if fenced else (lazy, 0))
    with zipfile.ZipFile(direct / "x.pt") as archive:
        records = {info.filename.partition("/")[2]: info.file_size for info in archive.infolist()}
    rest = sum(records.values()) - lazy
    assert sum(tensor.nbytes for tensor in small) < rest < 8192 and stats.bytes_copied_in_save == rest
    structure = inspection.files_of(pending)[0].job.stats["bytes_of_structure"]
    assert stats.bytes_total == lazy + rest + structure


def test_a_change_during_a_direct_write_does_not_reach_the_file(native: Any, direct: Path) -> None:
    """The writer has its own copy by then, and writes that."""
    native.set_fault("pwritev", delay_s=DEADLINE_S)
    weight = random_bytes(3 * MIB)
    expected = weight.clone()
    pending = save([weight], direct / "x.pt", writers=1, chunk_bytes="4MiB", arena_bytes="32MiB", verify_capture=True)
    wait_until(lambda: inspection.files_of(pending)[0].job.captured, DEADLINE_S, "the capture")
    as_bytes(weight).zero_()
    native.clear_faults()
    assert check(pending, [expected]).direct_io is True


def test_a_memory_file_system(in_memory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    inspection.forget_notices()
    state = some_state()
    for name in ("a.pt", "b.pt", "c.pt"):
        stats = check(save(state, in_memory / name), state)
        assert stats.direct_io is False
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and str(in_memory) in warnings[0].getMessage()


@pytest.mark.parametrize("how", [{"direct_io": False}, {"record_alignment": 64}, {"record_alignment": 4096}], ids=str)
def test_no_direct_io_by_choice_is_no_reason_to_warn(
    how: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    inspection.forget_notices()
    state = some_state()
    stats = check(save(state, tmp_path / "x.pt", **how), state)
    assert stats.direct_io is False and caplog.records == []
    assert stats.bytes_from_tensors + stats.bytes_copied_in_save == stats.bytes_total  # no block to fill up


@pytest.mark.parametrize("limits", [(4096, 512), (512, 4096), (4096, 4096), (16384, 16384), (512, 32768)], ids=str)
@pytest.mark.parametrize("when", ["write", "fence"])
def test_any_alignment(limits: tuple[int, int], when: str, native: Any, direct: Path) -> None:
    native.override_io_limits(*limits)
    block = torch.empty(4 * MIB, dtype=torch.uint8)
    state = [random_bytes(2 * MIB + 13), *(block[at : at + MIB].random_(0, 256) for at in (1, 512 + MIB, 2 * MIB + 4096))]
    expected = [tensor.clone() for tensor in state]
    if when == "fence":
        native.set_fault("pwritev", delay_s=DEADLINE_S)
    pending = save(state, direct / "x.pt")
    if when == "fence":
        ckpt.fence()
        for tensor in state:
            as_bytes(tensor).zero_()
        native.clear_faults("pwritev")
    stats = check(pending, expected)
    assert stats.direct_io is True
    assert stats.bytes_copied_at_fence > 0 if when == "fence" else stats.bytes_from_tensors > 3 * MIB


@pytest.mark.parametrize("limits", [(4, 512), (16, 512)], ids=str)
def test_a_fence_stages_pieces_of_any_length_where_records_begin_anywhere(
    limits: tuple[int, int], native: Any, direct: Path
) -> None:
    """In a file of safetensors. A device that takes memory from anywhere still wants whole blocks."""
    native.override_io_limits(*limits)
    state = {f"t{number:02}": torch.randn(700_000 + 9 * number) for number in range(12)}
    expected = {name: tensor.clone() for name, tensor in state.items()}
    native.set_fault("pwritev", count=4, delay_s=0.3)
    pending = ckpt.save(state, direct / "x.safetensors", lazy=True, options=options())
    ckpt.fence()
    for tensor in state.values():
        tensor.zero_()
    pending.result(DEADLINE_S)
    assert pending.stats.bytes_copied_at_fence > 0 and pending.stats.direct_io is True
    assert_same(expected, ckpt.load(direct / "x.safetensors"))


@pytest.mark.parametrize("limits", [(4096, 65536), (65536, 512), (1 << 20, 1 << 20)], ids=str)
def test_an_alignment_larger_than_any_record_can_have(
    limits: tuple[int, int], native: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    inspection.forget_notices()
    native.override_io_limits(*limits)
    state = some_state()
    assert check(save(state, tmp_path / "x.pt"), state).direct_io is False
    assert len(caplog.records) == 1


@pytest.mark.parametrize("skip", [0, 3])
def test_a_kernel_that_grants_direct_io_and_then_refuses_it(skip: int, native: Any, direct: Path) -> None:
    native.set_fault("pwritev", skip=skip, count=1, error=errno.EINVAL)
    state = some_state()
    assert check(save(state, direct / "x.pt"), state).direct_io is False


@pytest.mark.parametrize("skip", [0, 1, 5])
@pytest.mark.parametrize("fenced", [False, True])
def test_memory_that_cannot_be_written_from_directly(direct: Path, native: Any, skip: int, fenced: bool) -> None:
    """Where a driver has mapped it: the kernel refuses the write, not the bytes. All else still goes past the page cache."""
    state = some_state()
    native.set_fault("pwritev", skip=skip, count=1, error=errno.EFAULT)
    pending = save(state, direct / "a.pt")
    if fenced:
        ckpt.fence()
    assert check(pending, state).direct_io


def test_memory_that_is_not_there(direct: Path, native: Any) -> None:
    """It is refused a second time, as a copy."""
    native.set_fault("pwritev", error=errno.EFAULT)
    with pytest.raises(StorageError, match="Bad address"):
        save(some_state(), direct / "a.pt").result(DEADLINE_S)
    assert not list(direct.iterdir())


def test_a_kernel_that_refuses_several_writers_at_once(native: Any, direct: Path) -> None:
    """All of them had asked before the first knew."""
    native.set_fault("pwritev", count=4, error=errno.EINVAL, delay_s=0.1)
    state = some_state()
    assert check(save(state, direct / "x.pt", writers=4), state).direct_io is False


def test_a_file_system_that_refuses_the_flag(native: Any, direct: Path) -> None:
    native.set_fault("fcntl", error=errno.EINVAL)
    state = some_state()
    assert check(save(state, direct / "x.pt"), state).direct_io is False


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.ENOSYS])
@pytest.mark.parametrize("is_direct", [True, False])
def test_a_file_system_without_fallocate(error: int, is_direct: bool, native: Any, tmp_path: Path) -> None:
    native.set_fault("fallocate", error=error)
    state = some_state()
    check(save(state, tmp_path / "x.pt", direct_io=is_direct), state)


DIRECT_SHORT = [0, 512, 4096, 65536 + 512]
BUFFERED_SHORT = [0, 1, 511, 70_000]


@pytest.mark.parametrize(
    ("is_direct", "short"), [(True, short) for short in DIRECT_SHORT] + [(False, short) for short in BUFFERED_SHORT]
)
def test_short_writes_are_continued(is_direct: bool, short: int, native: Any, tmp_path: Path) -> None:
    native.set_fault("pwritev", skip=1, count=5, short_bytes=short)
    state = some_state()
    check(save(state, tmp_path / "x.pt", direct_io=is_direct, writers=4), state)


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lazy", [True, None], ids=["lazy", "eager"])
@pytest.mark.parametrize("is_direct", [True, False])
def test_an_arena_smaller_than_one_tensor(lazy: bool | None, is_direct: bool, tmp_path: Path) -> None:
    state = [random_bytes(12 * MIB + 1), random_bytes(3), random_bytes(5 * MIB)]
    how = options(arena_bytes="1MiB", direct_io=is_direct)
    check(ckpt.save(state, tmp_path / "x.pt", lazy=lazy, options=how), state)


def test_back_pressure_is_reported(native: Any, tmp_path: Path) -> None:
    native.set_fault("pwritev", delay_s=0.03)
    state = [random_bytes(3 * MIB)]
    pending = ckpt.save(state, tmp_path / "x.pt", options=options(arena_bytes="1MiB", writers=1))
    stats = check(pending, state)
    assert stats.arena_wait_s > 0.1
    assert stats.save_s >= stats.arena_wait_s


def test_waiting_at_the_fence_is_reported(native: Any, tmp_path: Path) -> None:
    native.set_fault("pwritev", delay_s=0.03)
    state = [random_bytes(3 * MIB)]
    pending = save(state, tmp_path / "x.pt", arena_bytes="1MiB", writers=1)
    began = time.monotonic()
    ckpt.fence()
    took = time.monotonic() - began
    stats = check(pending, state)
    assert 0.1 < stats.arena_wait_s <= stats.fence_s <= took
    assert stats.bytes_copied_at_fence > 0


def test_the_arena_is_empty_afterwards_and_never_larger_than_its_cap(native: Any, tmp_path: Path) -> None:
    native.set_fault("pwritev", delay_s=0.002)
    how = options(arena_bytes="2MiB")
    engine = inspection.engine_for(how)
    for number in range(4):
        state = some_state()
        pending = ckpt.save(state, tmp_path / f"{number}.pt", lazy=number % 2 == 0, options=how)
        ckpt.fence()
        check(pending, state)
    assert engine.arena_used == 0 and engine.in_flight == 0
    assert 0 < engine.arena_peak <= engine.arena_bytes == 2 * MIB


def test_nothing_but_empty_tensors(tmp_path: Path) -> None:
    for number, state in enumerate(([torch.empty(0)], [torch.empty(0), torch.empty(3, 0).half(), torch.empty(0)], [], None)):
        check(save(state, tmp_path / f"{number}.pt"), state)


def test_tensors_around_the_size_of_a_page_and_of_a_chunk(tmp_path: Path) -> None:
    edges = [512, 4096, 64 * 1024, 128 * 1024]
    state = [random_bytes(edge + more) for edge in edges for more in (-1, 0, 1)]
    check(save(state, tmp_path / "x.pt", chunk_bytes="64KiB", eager_bytes=0), state)


@pytest.mark.slow
def test_more_records_than_16_bits_count(tmp_path: Path) -> None:
    state = [tensor.clone() for tensor in torch.arange(65_600, dtype=torch.int32).view(-1, 1).unbind()]
    path = save(state, tmp_path / "x.pt").result(DEADLINE_S)
    assert torch.equal(torch.cat(ckpt.load(path)), torch.arange(65_600, dtype=torch.int32))
    with zipfile.ZipFile(path) as archive:
        assert len(archive.namelist()) == 65_600 + 4
        assert archive.read("x/data/65599") == (65_599).to_bytes(4, "little")


def test_a_file_beyond_4_gib(tmp_path: Path) -> None:
    """The largest record that 32 bits count, and behind it one whose header lies beyond them."""
    state = [torch.arange(5), torch.empty(2**32 - 2, dtype=torch.uint8), torch.arange(300_000)]
    state[1][-1000:].random_(0, 256)
    path = tmp_path / "large.pt"
    try:
        pending = save(state, path, arena_bytes="64MiB", chunk_bytes="4MiB")
        ckpt.fence()
        pending.result(120)
        loaded = torch.load(path, mmap=True)
        assert torch.equal(loaded[0], state[0]) and torch.equal(loaded[2], state[2])
        assert torch.equal(loaded[1][-1000:], state[1][-1000:]) and not loaded[1][: 64 * MIB].any()
        with zipfile.ZipFile(path) as archive:
            infos = {info.filename: info for info in archive.infolist()}
            assert infos["large/data/1"].file_size == 2**32 - 2
            assert infos["large/data/2"].header_offset > 2**32
            assert archive.read("large/data/2") == state[2].numpy().tobytes()
    finally:
        path.unlink(missing_ok=True)


# ---- saves that meet -------------------------------------------------------------------------------------------------


def test_a_busy_engine_skips_if_told_to(native: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    native.set_fault("fdatasync", delay_s=DEADLINE_S)
    how = options(when_busy="skip", max_in_flight=1)
    first = ckpt.save([torch.ones(3)], tmp_path / "a.pt", options=how)
    second = ckpt.save([torch.ones(3)], tmp_path / "b.pt", options=how)
    assert not first.done()
    native.clear_faults()
    assert second.done() and second.captured and isinstance(second.exception(), SkippedError)
    with pytest.raises(SkippedError, match=r"b\.pt"):
        second.result()
    first.result(DEADLINE_S)
    assert sorted(os.listdir(tmp_path)) == ["a.pt"]
    assert caplog.records == [], "a skipped save is no failure"
    ckpt.save([torch.ones(3)], tmp_path / "c.pt", options=how).result(DEADLINE_S)


def test_a_busy_engine_is_waited_for(native: Any, tmp_path: Path) -> None:
    native.set_fault("fdatasync", "0.pt", delay_s=0.2)
    native.set_fault("fdatasync", "2.pt", delay_s=DEADLINE_S)
    how = options(max_in_flight=2)
    begin = time.monotonic()
    saves = [ckpt.save([torch.ones(3)], tmp_path / f"{number}.pt", options=how) for number in range(3)]
    assert saves[0].done() and time.monotonic() - begin >= 0.2
    assert not saves[2].done()
    native.clear_faults()
    assert [save.result(DEADLINE_S).name for save in saves] == ["0.pt", "1.pt", "2.pt"]


def test_waiting_for_a_busy_engine_has_an_end(native: Any, tmp_path: Path) -> None:
    native.set_fault("fdatasync", delay_s=DEADLINE_S)
    how = options(max_in_flight=1, timeout_s=1.0)
    first = ckpt.save([torch.ones(3)], tmp_path / "a.pt", options=how)
    with pytest.raises(DeadlineError, match=r"b\.pt.*not begun"):
        ckpt.save([torch.ones(3)], tmp_path / "b.pt", options=how)
    native.clear_faults()
    first.result(DEADLINE_S)
    ckpt.save([torch.ones(3)], tmp_path / "c.pt", options=how).result(DEADLINE_S)


def test_waiting_for_the_arena_has_an_end(native: Any, tmp_path: Path) -> None:
    native.set_fault("pwritev", count=2, delay_s=DEADLINE_S)
    state = [random_bytes(6 * MIB)]
    pending = ckpt.save(state, tmp_path / "a.pt", options=options(arena_bytes="1MiB", timeout_s=0.2))
    native.clear_faults()
    with pytest.raises(DeadlineError, match="room in the arena"):
        pending.result(DEADLINE_S)
    assert list(tmp_path.iterdir()) == []
    check(ckpt.save(state, tmp_path / "b.pt", options=options(arena_bytes="1MiB")), state)


def test_ctrl_c_ends_a_wait_for_the_arena(native: Any, tmp_path: Path) -> None:
    native.set_fault("pwritev", delay_s=DEADLINE_S)
    how = options(arena_bytes="1MiB", chunk_bytes="64KiB", writers=1)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        ckpt.save([random_bytes(8 * MIB)], tmp_path / "x.pt", options=how)
    assert time.monotonic() - begin < DEADLINE_S / 2
    native.clear_faults()
    wait_until(lambda: os.listdir(tmp_path) == [], what="the removal of the temporary file")
    state = some_state()
    check(ckpt.save(state, tmp_path / "y.pt", options=how), state)


def test_saves_from_several_threads_at_once(tmp_path: Path) -> None:
    states = [[random_bytes(MIB), torch.full((7,), number)] for number in range(4)]
    saves: dict[int, ckpt.PendingSave] = {}

    def work(number: int) -> None:
        for _ in range(5):
            path = tmp_path / f"{number}.pt"
            saves[number] = ckpt.save(states[number], path, lazy=number % 2 == 0, options=options(max_in_flight=3))
            if number == 0:
                ckpt.fence()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    for number, state in enumerate(states):
        check(saves[number], state)
    assert sorted(os.listdir(tmp_path)) == [f"{number}.pt" for number in range(4)]


def test_saves_to_one_path_end_with_the_last(tmp_path: Path) -> None:
    saves = [
        ckpt.save([torch.full((50_000,), number)], tmp_path / "x.pt", options=options(max_in_flight=8)) for number in range(8)
    ]
    for save in saves:
        save.result(DEADLINE_S)
    assert ckpt.load(tmp_path / "x.pt")[0][0] == 7
    assert os.listdir(tmp_path) == ["x.pt"]


def test_the_instants_come_in_order(tmp_path: Path) -> None:
    for lazy in (True, None):
        begin = time.monotonic()
        pending = ckpt.save(some_state(), tmp_path / "x.pt", lazy=lazy, options=options())
        ckpt.fence()
        pending.result(DEADLINE_S)
        stats = pending.stats
        instants = [begin, stats.started_at, stats.captured_at, stats.flushed_at, stats.durable_at, time.monotonic()]
        assert instants == sorted(instants)  # type: ignore[type-var]
        assert 0 < stats.save_s < DEADLINE_S
