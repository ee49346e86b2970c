"""Saves that are told what does not change: it is not read. Whoever writes to it all the same is saved right, or told of."""

from __future__ import annotations

import errno
import gc
import logging
import shutil
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from choice import mostly_slow
from mounting import MIB, mounted
from reuse_runs import Run, shared_bytes
from support import DEADLINE_S, assert_same, options

import ckpt
from ckpt.dcp import DcpCheckpointer
from ckpt.errors import CaptureError, StorageError
from ckpt.plan.frozen_marks import FrozenHint

FROZEN = 6 * MIB
MOST = FROZEN - MIB // 8  # of it, what lies in whole blocks of large pieces
REFRESH = 8

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mounted("xfs", tmp_path_factory.mktemp("frozen") / "disk", 512 * MIB) as place:
        yield place


@pytest.fixture
def place(disk: Path) -> Iterator[Path]:
    """A directory on a file system that shares blocks."""
    made = disk / "here"
    made.mkdir()
    yield made
    shutil.rmtree(made)


@pytest.fixture
def run(place: Path) -> Iterator[Run]:
    """Of which two saves have been made, so that the third does not read what is frozen."""
    with Run(place, frozen=FROZEN // MIB, refresh_every=REFRESH, max_failed_saves=0) as run:
        run.hint = run.state["frozen"]
        assert (run.save(), run.save()) == (0, 0)
        yield run
        run.check(*run.saved)


def test_it_is_not_read_and_not_copied(run: Run) -> None:
    for _ in range(3):
        pending = run.begin()
        pending.result(DEADLINE_S)
        stats = pending.stats
        assert stats.unread_bytes == stats.reused_bytes > MOST
        assert stats.bytes_from_tensors + stats.bytes_copied_in_save + stats.bytes_copied_at_fence < stats.bytes_total - MOST
    assert shared_bytes(run.file(4)) >= MOST


@pytest.mark.parametrize("direct_io", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_generation_after_generation(place: Path, direct_io: bool) -> None:
    """All is read, and written, in each 8th; the loss of any checkpoint does no harm to the others."""
    with Run(place, frozen=FROZEN // MIB, refresh_every=REFRESH, direct_io=direct_io) as run:
        run.hint = [run.state["frozen"]]
        unread = [bool(run.save() and run.unread > MOST) for _ in range(12)]
        assert unread == [False] * 2 + [True] * (REFRESH - 1) + [False, True, True]
        for step in (3, 8, 0, 11, 5):
            shutil.rmtree(run.file(step).parent)
            del run.saved[step]
            run.check(*run.saved)


# ---- what could write to these bytes ---------------------------------------------------------------------------------


def step_of_an_optimizer(tensor: torch.Tensor) -> None:
    parameter = torch.nn.Parameter(tensor)
    parameter.grad = torch.ones_like(tensor)
    torch.optim.SGD([parameter], lr=0.1).step()


def load_state_dict(tensor: torch.Tensor) -> None:
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(tensor)
    module.load_state_dict({"weight": torch.full_like(tensor, 3.0)})


TOLD: dict[str, Callable[[Any], Any]] = {
    "in_place": lambda tensor: tensor.mul_(2),
    "by_a_view": lambda tensor: tensor.detach()[77:78].add_(1),
    "by_foreach": lambda tensor: torch._foreach_add_([tensor], 1.0),
    "step": step_of_an_optimizer,
    "load_state_dict": load_state_dict,
    "swapped": lambda tensor: setattr(tensor, "data", torch.full_like(tensor, 7.0)),
}
NOT_TOLD: dict[str, Callable[[Any], Any]] = {
    "data": lambda tensor: tensor.data.mul_(1.5),
    "numpy": lambda tensor: tensor.numpy().fill(4),
}


@pytest.mark.parametrize(("how",), mostly_slow([(each,) for each in TOLD], [("in_place",), ("load_state_dict",), ("swapped",)]))
def test_what_torch_tells_of_is_saved(how: str, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.save()
    assert run.unread > MOST
    TOLD[how](run.state["frozen"])
    run.save()
    assert run.unread == 0
    run.save()
    run.save()
    assert run.unread > MOST
    assert "frozen" not in caplog.text


@pytest.mark.parametrize("how", NOT_TOLD)
def test_what_nothing_tells_of_is_seen_and_saved(how: str, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """Where it writes to all of it, as most do."""
    run.save()
    NOT_TOLD[how](run.state["frozen"])
    with caplog.at_level(logging.WARNING, "ckpt"):
        run.save()
    assert run.unread == 0
    assert "tensor frozen (float32" in caplog.text and "has changed: it is saved as it is" in caplog.text
    run.save()
    run.save()
    assert run.unread > MOST


def test_a_single_element_is_found_when_all_is_read_again(run: Run) -> None:
    """Until then it is not: the one thing that frozen= must not be given."""
    run.save()
    value = run.state["frozen"].numpy()
    middle = FROZEN // 8 + 12_345
    before, value[middle] = value[middle].copy(), 1e30
    old = []
    for _ in range(REFRESH - 2):
        pending = run.begin()
        old.append(run.step)
        pending.result(DEADLINE_S)
        run.saved[run.step]["frozen"][middle] = torch.tensor(before)
        run.check(run.step)
        assert pending.stats.unread_bytes > MOST
    error = run.begin().exception(DEADLINE_S)
    del run.saved[run.step]
    assert isinstance(error, CaptureError)
    assert "tensor frozen (float32" in str(error) and "declared frozen" in str(error)
    assert "after step 1 " in str(error), "of which all was read"
    for _ in range(4):
        run.save()
        assert run.unread == 0, "it is not believed again"
    assert run.save() > MOST, "as without the hint"


def test_all_that_has_changed_is_distrusted_at_once(run: Run) -> None:
    """And not one tensor after the other, in as many failed saves."""
    run.state["also"] = torch.randn(FROZEN // 4)
    run.hint = [run.state["frozen"], run.state["also"]]
    for _ in range(3):
        run.save()
    assert run.unread > 2 * MOST
    for tensor in run.hint:
        tensor.numpy()[FROZEN // 8 + 54_321] = 7e7
    errors = 0
    for _ in range(REFRESH + 2):
        errors += isinstance(run.begin().exception(DEADLINE_S), CaptureError)
        del run.saved[run.step]
    assert errors == 1
    run.save()


def test_an_operation_on_a_whole_is_seen_in_its_part() -> None:
    """Of a DTensor: the counter of the part that lies here stands still. Samples must not be needed, which devices have not."""
    from torch.distributed.tensor import DTensor

    part = torch.randn(1000)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        whole = DTensor.from_local(part, dist.init_device_mesh("cpu", (1,)))
        record: Any = types.SimpleNamespace(storage=part.untyped_storage(), low=0, nbytes=4000, tensor=None, others=None)
        before, again = FrozenHint(whole).mark_of(record), FrozenHint(whole).mark_of(record)
        assert before is not None and again is not None and before.holds(again)
        with torch.no_grad():
            whole.mul_(2)
        later = FrozenHint(whole).mark_of(record)
        assert later is not None and not before.holds(later)
    finally:
        dist.destroy_process_group()


def test_what_an_optimizer_steps_is_not_believed() -> None:
    """Whatever is said of it now: fused steps may move no counter."""
    parameter = torch.nn.Parameter(torch.randn(100))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    parameter.requires_grad_(False)
    assert FrozenHint(parameter).tensors == []
    del optimizer


def test_another_counter_tells_nothing(run: Run) -> None:
    """`.data` has one of its own, which no step moves."""
    tensor = run.state["frozen"]
    for _ in range(4):
        run.hint = tensor.data
        run.save()
        assert run.unread == 0


def test_memory_that_is_used_again_is_other_memory(run: Run) -> None:
    memory = bytearray(FROZEN)
    run.state["frozen"] = run.hint = torch.frombuffer(memory, dtype=torch.float32)
    for _ in range(3):
        run.save()
    assert run.unread > MOST
    run.hint = run.state["frozen"] = None
    gc.collect()
    memory[1000:1001] = b"x"
    run.state["frozen"] = run.hint = torch.frombuffer(memory, dtype=torch.float32)
    run.save()
    assert run.unread == 0


def test_another_tensor_at_the_same_place_of_the_file(run: Run) -> None:
    """Of the same length, and as frozen as the one that was there."""
    others = {name: torch.full((FROZEN // 4,), float(index)) for index, name in enumerate("abc")}
    run.state = others | run.state
    run.hint = [*others.values(), run.state["frozen"]]
    for _ in range(3):
        run.save()
    assert run.unread > 4 * MOST - MIB
    del run.state["a"]
    run.save()
    run.state = {name: run.state[name] for name in ("c", "b", "frozen", "small", "learning", "step")}
    run.save()
    run.save()
    run.save()
    assert run.unread > 3 * MOST - MIB


def test_a_part_of_a_storage_says_nothing_of_the_rest(run: Run) -> None:
    whole = torch.randn(FROZEN // 4)
    run.state["frozen"] = whole
    run.hint = whole[: FROZEN // 8]
    for _ in range(4):
        run.save()
    assert run.unread == 0
    run.hint = whole
    run.save()
    run.save()
    assert run.unread > MOST


def test_of_a_module_the_parameters_are_meant_that_do_not_learn(run: Run) -> None:
    run.state["model"] = {}
    model = torch.nn.Sequential(torch.nn.Linear(1000, 600), torch.nn.Linear(600, 1000), torch.nn.BatchNorm1d(600_000))
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    buffer = model[2].running_mean
    run.hint = model

    def save() -> None:
        run.state |= {f"{number}": value for number, value in enumerate(model.state_dict().values())}
        run.save()

    for _ in range(3):
        assert buffer is not None
        buffer.numpy()[5] += 1  # a buffer may change, by whatever way
        save()
    assert 4 * 600_000 * 3 - MIB < run.unread < 4 * 600_000 * 3
    model[0].requires_grad_(True)
    save()
    assert run.unread < 4 * 600_000 * 2


def test_what_can_be_given() -> None:
    tensor, module = torch.zeros(3), torch.nn.Linear(2, 2).requires_grad_(False)
    assert len(FrozenHint([tensor, module, {"a": torch.zeros(1)}]).tensors) == 4
    with torch.inference_mode():
        assert FrozenHint(torch.zeros(3)).tensors == [], "it has no version"
    assert FrozenHint(torch.zeros(3).to_sparse()).tensors == []
    assert FrozenHint(torch.nn.Parameter(torch.zeros(3))).tensors == [], "what learns is not frozen"
    assert FrozenHint(torch.zeros(3).share_memory_()).tensors == [], "another process may write to it"
    with pytest.raises(TypeError, match="frozen= takes tensors, modules or an iterable of these, not int"):
        FrozenHint(3)


def test_with_verify_capture_all_is_read(place: Path) -> None:
    with Run(place, verify_capture=True) as run:
        run.hint = run.state["frozen"]
        for _ in range(4):
            run.save()
        assert run.unread == 0


# ---- blocks that cannot be shared ------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [errno.EIO, errno.EOPNOTSUPP])
def test_what_cannot_be_shared_is_read_at_last(run: Run, native: Any, error: int) -> None:
    run.save()
    native.set_fault("FICLONERANGE", error=error)
    assert run.save() == 0 == run.unread
    native.clear_faults()


def refused_behind(run: Run, native: Any, change: Callable[[], object]) -> BaseException:
    """How a save ends whose blocks are refused, and whose memory is changed behind the fence before it is read at last.

    On a machine that is too slow for that the save is right; then it gets more time.
    """
    for delay_s in (0.5, 2.0, 8.0):
        native.set_fault("fallocate", delay_s=delay_s)
        native.set_fault("FICLONERANGE", error=errno.EIO)
        pending = run.begin()
        ckpt.fence()
        change()
        error = pending.exception(DEADLINE_S)
        native.clear_faults()
        if error is not None:
            del run.saved[run.step]
            return error
        run.check(run.step)
        for _ in range(3):
            run.save()
    raise AssertionError("the memory was read before it could be changed, each time")


@pytest.mark.parametrize("direct_io", [True, False])
def test_and_must_be_what_it_was(place: Path, native: Any, direct_io: bool) -> None:
    """Else it has changed behind the fence, and is not what was to be saved."""
    with Run(place, frozen=FROZEN // MIB, direct_io=direct_io, max_failed_saves=0) as run:
        tensor = run.hint = run.state["frozen"]
        for _ in range(3):
            run.save()
        error = refused_behind(run, native, lambda: tensor.add_(1))
        assert isinstance(error, CaptureError) and "tensor frozen (float32" in str(error)
        run.save()
        run.check(*run.saved)


def test_memory_that_is_taken_away_meanwhile_fails_the_save_alone(place: Path, native: Any) -> None:
    """As FSDP does it with what it has gathered; the process lives, and the next save reads and writes all."""
    with Run(place, frozen=40, max_failed_saves=0) as run:  # so much goes back to the kernel at once
        run.hint = run.state["frozen"]
        for _ in range(3):
            run.save()
        kept = run.state["frozen"].clone()

        def take_away() -> None:
            taken, run.state["frozen"] = run.state["frozen"], kept.clone()
            run.hint = run.state["frozen"]
            taken.untyped_storage().resize_(0)

        error = refused_behind(run, native, take_away)
        assert isinstance(error, StorageError) and "declared frozen" in str(error) and "or gone" in str(error)
        run.save()
        assert run.unread == 0


def test_memory_that_is_let_go_of_is_kept_until_it_is_written(run: Run, native: Any) -> None:
    run.save()
    native.set_fault("fallocate", delay_s=0.5)
    native.set_fault("FICLONERANGE", error=errno.EIO)
    pending = run.begin()
    ckpt.fence()
    run.hint = run.state["frozen"] = None
    gc.collect()
    filler = [torch.full((FROZEN // 4,), -1.0) for _ in range(8)]
    pending.result(DEADLINE_S)
    native.clear_faults()
    run.check(run.step)
    del filler


# ---- other ways to save ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_bundles(place: Path, suffix: str) -> None:
    state = {"frozen": torch.randn(MIB), "learning": torch.randn(MIB // 3)}
    with ckpt.BundleCheckpointer(options=options()) as checkpointer:
        unread = []
        for step in range(5):
            state["learning"].add_(1)
            bundle = checkpointer.begin(place / "root", f"step{step}", step=step)
            bundle.save(state, bundle.directory / f"part-{step}{suffix}", frozen=state["frozen"])
            pending = bundle.commit()
            pending.result(DEADLINE_S)
            unread.append(pending.stats.unread_bytes)
            assert_same(state, ckpt.load(place / "root" / f"step{step}" / f"part-{step}{suffix}"))
    assert unread[:2] == [0, 0] and min(unread[2:]) > 3 * MIB


def test_sharded_states(place: Path) -> None:
    state = {"frozen": torch.randn(MIB), "learning": torch.randn(MIB), "also": torch.randn(MIB // 2)}
    with DcpCheckpointer(options=options(), alone=True) as saver:
        unread = []
        for step in range(5):
            state["learning"].add_(1)
            pending = saver.save(place / f"step{step}", state, frozen=[state["frozen"], state["also"]])
            pending.result(DEADLINE_S)
            unread.append(pending.stats.unread_bytes)
            found = {key: torch.zeros_like(value) for key, value in state.items()}
            torch.distributed.checkpoint.load(found, checkpoint_id=place / f"step{step}", no_dist=True)
            assert_same(state, found)
    assert unread[:2] == [0, 0] and min(unread[2:]) > 5 * MIB
