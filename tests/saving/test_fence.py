"""The promise of the fence: what save() was given is what the file holds, whatever is written to the tensors afterwards."""

from __future__ import annotations

import dataclasses
import os
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support import DEADLINE_S, as_bytes, assert_same, clear_faults, close_engines, options, wait_until

import ckpt
from ckpt import _native
from ckpt.errors import CaptureError, DeadlineError
from ckpt.saving import inspection

MIB = 1 << 20


def scribble(*tensors: torch.Tensor) -> None:
    """Inverts every byte, behind the back of the version counters."""
    for tensor in tensors:
        as_bytes(tensor.data).bitwise_xor_(0xFF)


def copy_of(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


# ---- any state, any options, any timing ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    sizes: tuple[int, ...]  # bytes, of one tensor each
    lazy: tuple[bool, ...]  # cycled over the tensors
    arena_bytes: int
    chunk_bytes: int
    writers: int
    how: dict[str, Any]  # more options
    limits: tuple[int, int] | None  # of direct I/O, pretended
    delay_s: float  # of every write
    saves: int  # before the fence
    fence_after_s: float


SIZES = st.one_of(st.sampled_from([0, 1, 64, 4095, 4096, 4097, 65536, MIB]), st.integers(0, 9000), st.integers(0, 3 * MIB))
VARIANTS = [{}, {}, {"direct_io": False}, {"record_alignment": 64}, {"record_alignment": 4096}, {"eager_bytes": 0}]
CASES = st.builds(
    Case,
    sizes=st.lists(SIZES, min_size=1, max_size=8).map(tuple),
    lazy=st.sampled_from([(True,), (True,), (True, False), (False, True, True)]),
    arena_bytes=st.sampled_from([MIB, MIB + 4096, 3 * MIB, 16 * MIB]),
    chunk_bytes=st.sampled_from([1 << power for power in range(16, 23)]),
    writers=st.integers(1, 4),
    how=st.sampled_from(VARIANTS),
    limits=st.sampled_from([None, None, None, (512, 4096), (4096, 512), (16384, 16384)]),
    delay_s=st.sampled_from([0.0, 0.0, 0.001, 0.004]),
    saves=st.integers(1, 3),
    fence_after_s=st.sampled_from([0.0, 0.0, 0.002, 0.01]),
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=CASES)
@example(Case((3 * MIB,) * 3, (True,), MIB, 1 << 16, 1, {}, None, 0.004, 3, 0.0))
@example(Case((5 * MIB, 0, 7), (True,), MIB, 1 << 22, 4, {}, (512, 4096), 0.004, 1, 0.0))
@example(Case((2 * MIB, 100_001) * 3, (False, True), MIB, 1 << 17, 2, {"direct_io": False}, None, 0.001, 2, 0.0))
@pytest.mark.usefixtures("native")
def test_the_file_holds_the_bytes_of_the_call(case: Case) -> None:
    tensors = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in case.sizes]
    is_lazy = [case.lazy[index % len(case.lazy)] for index in range(len(tensors))]
    lazy = [tensor for tensor, wanted in zip(tensors, is_lazy, strict=True) if wanted]
    eager = [tensor for tensor, wanted in zip(tensors, is_lazy, strict=True) if not wanted]
    how = options(arena_bytes=case.arena_bytes, chunk_bytes=case.chunk_bytes, writers=case.writers, max_in_flight=4, **case.how)
    try:
        if case.limits:
            _native.override_io_limits(*case.limits)
        if case.delay_s:
            _native.set_fault("pwritev", delay_s=case.delay_s)
        with tempfile.TemporaryDirectory() as directory:
            check_saves(case, tensors, lazy, eager, how, Path(directory))
    finally:
        clear_faults()
        close_engines()


def check_saves(
    case: Case,
    tensors: list[torch.Tensor],
    lazy: list[torch.Tensor],
    eager: list[torch.Tensor],
    how: ckpt.Options,
    directory: Path,
) -> None:
    expected, saves = [], []
    for number in range(case.saves):
        expected.append(copy_of(tensors))
        saves.append(ckpt.save(tensors, directory / f"{number}.pt", lazy=lazy, options=how))
        scribble(*eager)
    time.sleep(case.fence_after_s)
    ckpt.fence()
    scribble(*tensors)
    assert all(save.captured for save in saves)
    for state, save in zip(expected, saves, strict=True):
        assert_same(state, ckpt.load(save.result(DEADLINE_S)))


def test_without_the_fence_other_bytes_would_leave(native: Any, tmp_path: Path) -> None:
    """The control: what the property above would see if the fence did nothing."""
    native.set_fault("pwritev", delay_s=DEADLINE_S)
    tensor = torch.zeros(4 * MIB, dtype=torch.uint8)
    pending = ckpt.save([tensor], tmp_path / "x.pt", lazy=True, options=options())
    scribble(tensor)
    native.clear_faults()
    with pytest.raises(CaptureError, match=r"tensor \[0\]"):
        pending.result(DEADLINE_S)


# ---- optimizers ------------------------------------------------------------------------------------------------------


class Job:
    """A model and an optimizer that has stepped; `go()` changes all their tensors."""

    def __init__(self, optimizer_class: Any = torch.optim.SGD, *, with_closure: bool = False, **how: Any) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(256, 700), torch.nn.Linear(700, 256))
        self.optimizer = optimizer_class(self.model.parameters(), lr=0.1, **how)
        self.step: Any = self.optimizer.step
        if with_closure:
            self.step = lambda: self.optimizer.step(self.forward_backward)
        self.go()

    def forward_backward(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = self.model(torch.randn(4, 256)).square().mean()
        loss.backward()
        return loss

    def go(self) -> None:
        self.forward_backward()
        self.step()

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def copy(self) -> Any:
        with tempfile.TemporaryDirectory() as directory:
            torch.save(self.state(), Path(directory) / "x.pt")
            return torch.load(Path(directory) / "x.pt")


OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "foreach": False}),
    "sgd_foreach": (torch.optim.SGD, {"momentum": 0.9, "foreach": True}),
    "sgd_fused": (torch.optim.SGD, {"momentum": 0.9, "fused": True}),
    "adamw": (torch.optim.AdamW, {"foreach": False}),
    "adamw_foreach": (torch.optim.AdamW, {"foreach": True}),
    "adamw_fused": (torch.optim.AdamW, {"fused": True}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.5}),
}


def save_slowly(job: Job, path: Path, **how: Any) -> ckpt.PendingSave:
    """A save that the next step finds unwritten but for what the writers hold."""
    _native.set_fault("pwritev", delay_s=0.02)
    pending = ckpt.save(job.state(), path, options=options(chunk_bytes="64KiB", **how))
    assert not pending.captured
    return pending


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_step_fences_by_itself(name: str, native: Any, tmp_path: Path) -> None:
    kind, how = OPTIMIZERS[name]
    job = Job(kind, **how)
    expected = job.copy()
    job.forward_backward()
    pending = save_slowly(job, tmp_path / "x.pt")
    job.step()
    assert pending.captured
    clear_faults()
    assert_same(expected, ckpt.load(pending.result(DEADLINE_S)))
    assert not torch.equal(job.model[0].weight, expected["model"]["0.weight"])
    assert pending.stats.bytes_copied_at_fence > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_step_fences_by_itself(native: Any, tmp_path: Path) -> None:
    job = Job(torch.optim.AdamW)
    job.step = torch.compile(job.optimizer.step, backend="eager")
    job.go()
    expected = job.copy()
    job.forward_backward()
    pending = save_slowly(job, tmp_path / "x.pt")
    job.step()
    clear_faults()
    assert_same(expected, ckpt.load(pending.result(DEADLINE_S)))
    assert pending.stats.bytes_copied_at_fence > 0


def test_lbfgs_which_replaces_its_state(native: Any, tmp_path: Path) -> None:
    job = Job(torch.optim.LBFGS, with_closure=True, max_iter=2, history_size=2)
    for _ in range(3):
        job.go()
    expected = job.copy()
    pending = save_slowly(job, tmp_path / "x.pt")
    job.step()
    clear_faults()
    assert_same(expected, ckpt.load(pending.result(DEADLINE_S)))


def test_optimizers_that_step_inside_backward(native: Any, tmp_path: Path) -> None:
    job = Job()
    optimizers = {parameter: torch.optim.AdamW([parameter], lr=0.1) for parameter in job.model.parameters()}
    for parameter in job.model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    job.forward_backward()
    expected = job.copy()
    pending = save_slowly(job, tmp_path / "x.pt")
    job.forward_backward()
    assert pending.captured
    clear_faults()
    assert_same(expected, ckpt.load(pending.result(DEADLINE_S)))


def test_any_optimizer_fences_for_all(native: Any, tmp_path: Path) -> None:
    """Another one's step covers everything in flight, also what it does not own; then a hand-written update is safe."""
    job, other = Job(), Job()
    expected = job.copy()
    pending = save_slowly(job, tmp_path / "x.pt")
    other.go()
    assert pending.captured
    scribble(*job.model.parameters())
    clear_faults()
    assert_same(expected, ckpt.load(pending.result(DEADLINE_S)))


def test_a_gradient_scaler_steps_behind_the_fence(native: Any, tmp_path: Path) -> None:
    job, scaler = Job(torch.optim.AdamW), torch.amp.GradScaler("cpu")
    expected = job.copy()
    job.optimizer.zero_grad()
    scaler.scale(job.model(torch.randn(4, 256)).square().mean()).backward()
    pending = save_slowly(job, tmp_path / "x.pt")
    scaler.step(job.optimizer)
    clear_faults()
    assert_same(expected, ckpt.load(pending.result(DEADLINE_S)))
    assert not torch.equal(job.model[0].weight, expected["model"]["0.weight"])


def test_many_iterations_each_saved(native: Any, tmp_path: Path) -> None:
    """Every step while the previous save is still on its way, with writers that are slow now and then."""
    native.set_fault("pwritev", skip=3, count=200, delay_s=0.001)
    job, expected, saves = Job(torch.optim.AdamW, fused=True), [], []
    for number in range(12):
        expected.append(job.copy())
        how = options(chunk_bytes="64KiB", arena_bytes="3MiB", max_in_flight=3)
        saves.append(ckpt.save(job.state(), tmp_path / f"{number}.pt", options=how))
        job.go()
    for state, save in zip(expected, saves, strict=True):
        assert_same(state, ckpt.load(save.result(DEADLINE_S)))


# ---- what no fence protects ------------------------------------------------------------------------------------------


def test_before_the_first_step_everything_is_eager(native: Any, tmp_path: Path) -> None:
    native.set_fault("pwritev", delay_s=0.02)
    model = torch.nn.Linear(500, 500)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pending = ckpt.save(model.state_dict(), tmp_path / "x.pt", options=options())
    assert pending.captured
    scribble(*model.parameters())
    assert_same(expected, dict(ckpt.load(pending.result(DEADLINE_S))))
    assert pending.stats.bytes_from_tensors == pending.stats.bytes_copied_at_fence == 0
    del optimizer


def test_what_no_optimizer_owns_is_eager(native: Any, tmp_path: Path) -> None:
    """An average of the weights, a replay buffer: written by anybody at any time."""
    native.set_fault("pwritev", delay_s=0.02)
    job = Job()
    average = {name: tensor.clone() for name, tensor in job.model.state_dict().items()}
    loose = torch.randn(300_000)
    expected = copy_of([*average.values(), loose])
    pending = ckpt.save([*average.values(), loose], tmp_path / "x.pt", options=options())
    scribble(*average.values(), loose)
    assert_same(expected, ckpt.load(pending.result(DEADLINE_S)))


def test_batch_norm_statistics_may_change_in_forward(native: Any, tmp_path: Path) -> None:
    native.set_fault("pwritev", delay_s=0.02)
    model = torch.nn.Sequential(torch.nn.Linear(64, 30_000), torch.nn.BatchNorm1d(30_000))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 64)).sum().backward()
    optimizer.step()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pending = ckpt.save(model.state_dict(), tmp_path / "x.pt", lazy=model, options=options())
    model(torch.randn(4, 64) * 100)
    optimizer.step()
    assert_same(expected, dict(ckpt.load(pending.result(DEADLINE_S))))
    assert not torch.equal(model[1].running_mean, expected["1.running_mean"])
    assert pending.stats.bytes_copied_at_fence + pending.stats.bytes_from_tensors > 0


# ---- a fence in trouble ----------------------------------------------------------------------------------------------


def test_a_fence_with_nothing_in_flight_starts_nothing() -> None:
    close_engines()
    threads = threading.active_count()
    ckpt.fence()
    assert inspection.engine_count() == 0 and threading.active_count() == threads


def test_a_fence_that_cannot_be_met_gives_the_save_up_not_the_training(native: Any, tmp_path: Path) -> None:
    native.set_fault("pwritev", delay_s=DEADLINE_S)
    tensor = torch.zeros(8 * MIB, dtype=torch.uint8)
    pending = ckpt.save([tensor], tmp_path / "x.pt", lazy=True, options=options(arena_bytes="1MiB", timeout_s=0.3))
    begin = time.monotonic()
    ckpt.fence()
    assert 0.2 < time.monotonic() - begin < DEADLINE_S / 2
    native.clear_faults()
    with pytest.raises(DeadlineError, match="did not happen within"):
        pending.result(DEADLINE_S)
    assert list(tmp_path.iterdir()) == []


def test_the_timeout_is_that_of_the_save(native: Any, tmp_path: Path) -> None:
    """Also where an engine of the same size has served saves with a longer one."""
    ckpt.save([1], tmp_path / "first.pt", options=options(arena_bytes="1MiB")).result(DEADLINE_S)
    native.set_fault("pwritev", path_part="second", count=2, delay_s=DEADLINE_S)
    tensor = torch.zeros(8 * MIB, dtype=torch.uint8)
    pending = ckpt.save([tensor], tmp_path / "second.pt", lazy=True, options=options(arena_bytes="1MiB", timeout_s=0.3))
    begin = time.monotonic()
    ckpt.fence()
    assert time.monotonic() - begin < DEADLINE_S / 2
    native.clear_faults()
    with pytest.raises(DeadlineError):
        pending.result(DEADLINE_S)


def test_a_fence_after_a_failed_write_does_not_raise(native: Any, tmp_path: Path) -> None:
    native.set_fault("pwritev", error=28)
    job = Job()
    pending = ckpt.save(job.state(), tmp_path / "x.pt", options=options())
    job.go()
    assert pending.captured
    with pytest.raises(ckpt.CheckpointError, match="No space left"):
        pending.result(DEADLINE_S)


def test_fences_from_several_threads(native: Any, tmp_path: Path) -> None:
    native.set_fault("pwritev", delay_s=0.005)
    tensors = [torch.full((MIB,), i, dtype=torch.uint8) for i in range(6)]
    pending = ckpt.save(tensors, tmp_path / "x.pt", lazy=True, options=options(chunk_bytes="64KiB"))
    threads = [threading.Thread(target=ckpt.fence) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert pending.captured
    expected = copy_of(tensors)
    scribble(*tensors)
    assert_same(expected, ckpt.load(pending.result(DEADLINE_S)))


def test_captured_without_a_fence_once_all_is_written(tmp_path: Path) -> None:
    tensor = torch.ones(MIB)
    pending = ckpt.save([tensor], tmp_path / "x.pt", lazy=True, options=options())
    wait_until(lambda: pending.captured)
    tensor.zero_()
    assert ckpt.load(pending.result(DEADLINE_S))[0].all()


def test_ctrl_c_ends_a_wait_at_the_fence(native: Any, tmp_path: Path) -> None:
    """And stops the step before it writes; the save itself goes on."""
    job = Job()
    expected = job.copy()
    job.forward_backward()
    native.set_fault("pwritev", delay_s=DEADLINE_S)
    pending = ckpt.save(job.state(), tmp_path / "x.pt", options=options(arena_bytes="1MiB", chunk_bytes="64KiB", writers=1))
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        job.step()
    assert time.monotonic() - begin < DEADLINE_S / 2
    clear_faults()
    assert_same(expected, job.copy())
    assert_same(expected, ckpt.load(pending.result(DEADLINE_S)))
