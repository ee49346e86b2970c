"""Writes to lazy tensors that no optimizer step announces: the save fails and names the tensor, or its file is right."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import DEADLINE_S, assert_same, clear_faults, options, wait_until

import ckpt
from ckpt.errors import CaptureError
from ckpt.saving import inspection

MIB = 1 << 20
Write = Callable[[list[torch.Tensor]], object]


def write_in_numpy(tensors: list[torch.Tensor]) -> None:
    for tensor in tensors:
        tensor.detach().numpy()[...] += 1


def swap_averages_in(tensors: list[torch.Tensor]) -> None:
    for tensor in tensors:
        tensor.data.copy_(torch.zeros_like(tensor))


def perturb(tensors: list[torch.Tensor]) -> None:
    """The first step of sharpness-aware minimisation."""
    for tensor in tensors:
        tensor.data.add_(torch.full_like(tensor, 0.05))


def clamp(tensors: list[torch.Tensor]) -> None:
    for tensor in tensors:
        tensor.data.clamp_(-0.1, 0.1)


def average_in_place(tensors: list[torch.Tensor]) -> None:
    """What eval() of a schedule-free optimizer does."""
    for tensor in tensors:
        tensor.data.lerp_(torch.ones_like(tensor), 0.1)


def write_all_at_once(tensors: list[torch.Tensor]) -> None:
    torch._foreach_add_([tensor.data for tensor in tensors], 1.0)


def negate_from_the_end(tensors: list[torch.Tensor]) -> None:
    for tensor in reversed(tensors):
        flat = tensor.data.view(-1)
        for part in reversed(flat.split(4096)):
            part.neg_()


WRITERS: dict[str, Write] = {
    "data_copy": swap_averages_in,
    "clamp": clamp,
    "lerp": average_in_place,
    "perturb": perturb,
    "numpy": write_in_numpy,
    "foreach": write_all_at_once,
    "backwards": negate_from_the_end,
}


class Training:
    def __init__(self, width: int = 512) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Linear(width, width))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.model(torch.randn(2, width)).square().mean().backward()
        self.optimizer.step()

    @property
    def written(self) -> list[torch.Tensor]:
        return [*self.model.parameters(), *(state["exp_avg"] for state in self.optimizer.state.values())]

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def copy(self, directory: Path) -> Any:
        torch.save(self.state(), directory / "expected.pt")
        return torch.load(directory / "expected.pt")


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_write_before_the_capture_fails_the_save(write: Write, direct: bool, native: Any, tmp_path: Path) -> None:
    native.set_fault("pwritev", delay_s=DEADLINE_S)
    training = Training()
    versions = [tensor._version for tensor in training.written]
    pending = ckpt.save(training.state(), tmp_path / "x.pt", options=options(direct_io=direct))
    assert not pending.captured
    write(training.written)
    assert [tensor._version for tensor in training.written] == versions
    clear_faults()
    with pytest.raises(CaptureError, match=r"tensor (model\.[01]\.weight|optimizer\.state.*exp_avg) .*fence\(\)"):
        pending.result(DEADLINE_S)
    wait_until(lambda: not (tmp_path / "x.pt").exists() and not any(tmp_path.iterdir()), 5, "the removal of the file")


def test_the_fence_itself_finds_it(native: Any, tmp_path: Path) -> None:
    """What nobody has begun to write is copied by the fence, and compared there."""
    training = Training()
    with pytest.raises(CaptureError), ckpt.Checkpointer(tmp_path, options=options(arena_bytes="32MiB")) as checkpointer:
        checkpointer.save(1, training.state()).result(DEADLINE_S)
        native.set_fault("fallocate", delay_s=DEADLINE_S)
        pending = checkpointer.save(2, training.state())
        swap_averages_in(training.written)
        training.optimizer.step()
        assert pending.captured and pending.stats.bytes_from_tensors == 0
        native.clear_faults()
        assert isinstance(pending.exception(DEADLINE_S), CaptureError)
        assert checkpointer.steps() == [1]


def test_a_write_after_the_capture_was_seen_is_nobodys_business(native: Any, tmp_path: Path) -> None:
    native.set_fault("fdatasync", delay_s=DEADLINE_S)
    training = Training()
    expected = training.copy(tmp_path)
    pending = ckpt.save(training.state(), tmp_path / "x.pt", options=options())
    wait_until(lambda: pending.captured, DEADLINE_S, "the capture")
    for write in WRITERS.values():
        write(training.written)
    clear_faults()
    assert_same(expected, ckpt.load(pending.result(DEADLINE_S)))


def test_a_write_that_was_under_way_at_the_capture_is_found_at_the_end(native: Any, tmp_path: Path) -> None:
    """Nobody was told that the tensors may change: what the last look at them shows has to do with this save."""
    native.set_fault("fdatasync", delay_s=DEADLINE_S)
    training = Training()
    pending = ckpt.save(training.state(), tmp_path / "x.pt", options=options())
    job = inspection.files_of(pending)[0].job
    wait_until(lambda: job.captured, DEADLINE_S, "the capture")
    swap_averages_in(training.written)
    clear_faults()
    assert isinstance(pending.exception(DEADLINE_S), CaptureError)


@pytest.mark.parametrize("elements", [1, 15, 16, 17, 1000, 40_001])
def test_tensors_of_any_size_have_witnesses(elements: int, native: Any, tmp_path: Path) -> None:
    native.set_fault("pwritev", delay_s=DEADLINE_S)
    tensor = torch.ones(elements)
    how = options(eager_bytes=0, direct_io=False)
    pending = ckpt.save({"x": tensor}, tmp_path / "x.pt", lazy=True, options=how)
    tensor.data.zero_()
    clear_faults()
    if pending.stats.bytes_from_tensors == 0 and pending.exception(DEADLINE_S) is None:  # small enough to be copied
        assert_same({"x": torch.ones(elements)}, ckpt.load(tmp_path / "x.pt"))
    else:
        assert isinstance(pending.exception(DEADLINE_S), CaptureError)


@pytest.mark.parametrize("edge", [slice(0, 3), slice(-3, None)], ids=["first bytes", "last bytes"])
@pytest.mark.parametrize("fenced", [False, True])
def test_a_write_to_the_edge_of_a_tensor(edge: slice, fenced: bool, native: Any, tmp_path: Path) -> None:
    """It fills no block of the disk, and is as lazy as all else of the tensor: a fence has to come before."""
    native.set_fault("fallocate", delay_s=DEADLINE_S)
    tensor = torch.randint(0, 256, (MIB + 17,), dtype=torch.uint8)
    expected = tensor.clone()
    pending = ckpt.save([tensor], tmp_path / "x.pt", lazy=True, options=options(verify_capture=True))
    if fenced:
        ckpt.fence()
    tensor.numpy()[edge] ^= 0xFF
    clear_faults()
    if fenced:
        assert_same([expected], ckpt.load(pending.result(DEADLINE_S)))
        assert pending.stats.bytes_copied_at_fence == tensor.nbytes
    else:
        assert isinstance(pending.exception(DEADLINE_S), CaptureError)
        assert not list(tmp_path.glob("*.pt"))


def test_bytes_that_change_and_come_back_before_they_are_read(native: Any, tmp_path: Path) -> None:
    native.set_fault("fallocate", delay_s=DEADLINE_S)
    tensor = torch.ones(MIB)
    pending = ckpt.save([tensor], tmp_path / "x.pt", lazy=True, options=options())
    tensor.data.add_(1)
    tensor.data.sub_(1)
    clear_faults()
    assert_same([torch.ones(MIB)], ckpt.load(pending.result(DEADLINE_S)))


def test_bytes_that_come_back_between_the_checksum_and_the_write(native: Any, tmp_path: Path) -> None:
    """Averages are swapped in, evaluated, and swapped out again. A checksum of them in the file would spoil it."""
    native.set_fault("fallocate", delay_s=DEADLINE_S)
    native.set_fault("pwritev", delay_s=DEADLINE_S)
    tensor = torch.ones(MIB)
    pending = ckpt.save([tensor], tmp_path / "x.pt", lazy=True, options=options())
    tensor.data.add_(1)
    native.clear_faults("fallocate")
    wait_until(lambda: inspection.files_of(pending)[0].job.error is not None, DEADLINE_S, "the look behind the checksum")
    tensor.data.sub_(1)
    clear_faults()
    assert isinstance(pending.exception(DEADLINE_S), CaptureError)


def outcome(pending: ckpt.PendingSave, expected: Any) -> str:
    error = pending.exception(DEADLINE_S)
    if error is None:
        assert_same(expected, torch.load(pending.path))
        assert_same(expected, ckpt.load(pending.path))
        return "right"
    assert isinstance(error, CaptureError), error
    return "refused"


def race(rounds: int, seed: int, tmp_path: Path, native: Any, *, threads: bool) -> dict[str, int]:
    """A write at a random moment of a save: it may come too late to matter, and else the save must fail."""
    choose = random.Random(seed)
    training = Training()
    found = {"right": 0, "refused": 0}
    kept = [tensor.detach().clone() for tensor in training.written]
    expected = training.copy(tmp_path)
    for number in range(rounds):
        held = number % 7 == 0  # then the write comes in time, also where this thread is slow
        sizes, writers = (["64KiB"], [1]) if held else (["64KiB", "256KiB", "1MiB"], [1, 2, 4])
        how = options(chunk_bytes=choose.choice(sizes), writers=choose.choice(writers), arena_bytes="8MiB")
        native.set_fault("pwritev", delay_s=DEADLINE_S if held else choose.choice([0.0, 0.0, 0.0005, 0.002]))
        write = choose.choice(list(WRITERS.values()))
        pending = ckpt.save(training.state(), tmp_path / "x.pt", options=how)
        delay_s = choose.choice([0.0, choose.uniform(0, 0.004), choose.uniform(0, 0.03)])
        if threads:
            other = threading.Timer(delay_s, write, [training.written])
            other.start()
            if choose.random() < 0.3:
                time.sleep(choose.uniform(0, 0.01))
                other.join()  # a fence beside a write would be the program's own race
                ckpt.fence()
            if held:
                other.join()
                clear_faults()
            found[outcome(pending, expected)] += 1
            other.join()
        else:
            time.sleep(delay_s)
            write(training.written)
            clear_faults()
            if choose.random() < 0.5:
                ckpt.fence()
            found[outcome(pending, expected)] += 1
        clear_faults()
        with torch.no_grad():
            for tensor, before in zip(training.written, kept, strict=True):
                tensor.copy_(before)
        (tmp_path / "x.pt").unlink(missing_ok=True)
        assert number < 20 or found["refused"] > 0, "the writes come too late to test anything"
    return found


@pytest.mark.parametrize(
    "threads", [pytest.param(False, id="same_thread", marks=pytest.mark.slow), pytest.param(True, id="other_thread")]
)
def test_writes_at_random_moments(threads: bool, tmp_path: Path, native: Any) -> None:
    found = race(250, 1, tmp_path, native, threads=threads)
    assert found["refused"] > 25, found


@pytest.mark.slow
@pytest.mark.parametrize("threads", [False, True], ids=["same_thread", "other_thread"])
@pytest.mark.parametrize("seed", range(5))
def test_thousands_of_writes_at_random_moments(seed: int, threads: bool, tmp_path: Path, native: Any) -> None:
    found = race(1000, 100 + seed, tmp_path, native, threads=threads)
    assert found["refused"] > 100 and found["right"] > 10, found
