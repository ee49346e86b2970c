"""Tensors on devices, on machines that have none: host memory plays theirs, and a fake driver carries it."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device_training import Training, cuda, fake_library, options, state, training
from states import STATES
from support import assert_same, wait_until

import ckpt
from ckpt import devices as torch_devices
from ckpt.devices import HOST
from ckpt.errors import CaptureError, DeadlineError, DeviceError
from ckpt.saving import inspection

__all__ = ["cuda", "fake_library", "training"]


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("lazy", [True, False])
def test_states_come_back(name: str, lazy: bool, training: Training, tmp_path: Path) -> None:
    obj = STATES[name]()
    try:
        torch.save(obj, tmp_path / "stock.pt")
    except Exception:
        pytest.skip("torch.save refuses this state, and so do we")
    ckpt.save(obj, tmp_path / "a.pt", lazy=lazy, options=options()).result(30)
    assert_same(torch.load(tmp_path / "stock.pt", weights_only=False), torch.load(tmp_path / "a.pt", weights_only=False))
    assert_same(torch.load(tmp_path / "stock.pt", weights_only=False), ckpt.load(tmp_path / "a.pt", weights_only=False))


@pytest.mark.parametrize("seed", range(6))
def test_what_computes_after_the_fence_never_reaches_the_file(seed: int, training: Training, tmp_path: Path) -> None:
    training.cuda.configure(seed=seed, most_delay_s=0.01)
    devices: dict[int, int] = {}
    training.on = lambda storage: devices.get(storage.data_ptr(), 0)
    with ckpt.Checkpointer(tmp_path, keep=None, options=options(arena_bytes="1MiB")) as checkpointer:
        saved = []
        for step in range(4):
            current = state(float(step))
            tensors = [value for value in current.values() if isinstance(value, torch.Tensor)]
            devices.update({tensor.data_ptr(): number % 2 for number, tensor in enumerate(tensors)})
            pending = checkpointer.save(step, current, lazy=True)
            ckpt.fence()
            assert pending.captured
            for number, tensor in enumerate(tensors):
                training.fill(tensor, 0xEE, number % 2)
            saved.append((pending, current))
        for step, (pending, _) in enumerate(saved):
            assert_same(state(float(step)), torch.load(pending.result(30) / "state.pt"))
            assert pending.stats.bytes_from_devices > 1_000_000
    training.synchronize()


def test_what_has_not_left_at_the_fence_stays_on_the_device(training: Training, tmp_path: Path) -> None:
    """In spare memory: the fence returns although the arena is full and nothing leaves it."""
    sized = options(arena_bytes="1MiB", chunk_bytes="64KiB", device_cache="4MiB")
    with ckpt.Checkpointer(tmp_path, keep=None, options=sized) as checkpointer:
        for step in range(2):
            first = checkpointer.save(step, state(), lazy=True)
            first.result(30)
        assert first.stats.arena_pinned
        wait_until(lambda: inspection.engine_of(checkpointer).device_caches[0][0] > 0, what="the cache")
        training.cuda.hold_copies(True)
        current = state(2.0, count=12)
        pending = checkpointer.save(2, current, lazy=True)
        ckpt.fence()
        assert pending.captured and not pending.done()
        for value in current.values():
            if isinstance(value, torch.Tensor):
                training.fill(value, 0xEE)
        training.cuda.hold_copies(False)
        assert_same(state(2.0, count=12), torch.load(pending.result(30) / "state.pt"))
        assert pending.stats.bytes_from_devices >= pending.stats.device_cached_bytes > 1 << 20
    on_host = ckpt.save(state(), tmp_path / "host.pt", options=dataclasses.replace(sized, device_lazy=False))
    on_host.result(30)
    assert on_host.stats.device_cached_bytes == 0 and not on_host.stats.arena_pinned
    training.synchronize()


def test_eager_tensors_are_in_order_with_the_stream(training: Training, tmp_path: Path) -> None:
    """They may be overwritten by whatever is launched after save() has returned, without any fence."""
    training.cuda.configure(seed=3, most_delay_s=0.02)
    current = state()
    pending = ckpt.save(current, tmp_path / "a.pt", lazy=False, options=options())
    for value in current.values():
        if isinstance(value, torch.Tensor):
            training.fill(value, 0xEE)
    assert_same(state(), torch.load(pending.result(30)))
    training.synchronize()


def test_small_lazy_tensors_cost_save_no_copies(training: Training, tmp_path: Path) -> None:
    """Each copy is a call of the driver, and state dicts have thousands of small tensors."""
    tensors = {str(number): torch.full((number % 50 + 1,), float(number)) for number in range(2000)}
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    copied, sizes = {}, set[int]()
    for lazy in (True, False):
        pending = ckpt.save(tensors, tmp_path / "a.pt", lazy=lazy, options=options(eager_bytes="1MiB"))
        ckpt.fence()
        assert_same(tensors, torch.load(pending.result(30)))
        copied[lazy] = pending.stats.bytes_copied_in_save
        assert pending.stats.bytes_total == (tmp_path / "a.pt").stat().st_size
        sizes.add(pending.stats.bytes_total)
        assert pending.stats.bytes_from_devices == nbytes
    assert copied[False] - copied[True] == nbytes
    assert len(sizes) == 1, "laziness costs no padding here"


def test_memory_is_held_until_copies_have_ended(training: Training, tmp_path: Path) -> None:
    """After the fence a tensor may change, in stream order; its memory must stay."""
    memory = np.ones(400_000, dtype=np.float32)
    alive = weakref.ref(memory)
    current = {"weights": torch.from_numpy(memory)}
    training.cuda.hold_copies(True)
    pending = ckpt.save(current, tmp_path / "a.pt", lazy=True, options=options(arena_bytes="8MiB"))
    ckpt.fence()
    assert pending.captured and not pending.done()
    del memory, current
    gc.collect()
    assert alive() is not None
    training.cuda.hold_copies(False)
    assert_same({"weights": torch.ones(400_000)}, torch.load(pending.result(30)))
    gc.collect()
    assert alive() is None


def test_a_save_whose_copies_are_all_on_their_way_is_fenced_too(training: Training, tmp_path: Path) -> None:
    """It has no more to enqueue, but nothing orders the training behind its copies yet."""
    training.cuda.hold_copies(True)
    current = state()
    pending = ckpt.save(current, tmp_path / "a.pt", lazy=True, options=options(arena_bytes="8MiB"))
    job = inspection.files_of(pending)[0].job
    wait_until(lambda: job.captured, what="all copies to be enqueued")
    assert not pending.captured, "before a fence they may not be changed"
    ckpt.fence()
    assert pending.captured
    for value in current.values():
        if isinstance(value, torch.Tensor):
            training.fill(value, 0xEE)
    training.cuda.hold_copies(False)
    assert_same(state(), torch.load(pending.result(30)))
    training.synchronize()


@pytest.mark.parametrize("device", [1, HOST])
def test_a_fence_does_not_wait_for_what_an_earlier_one_has_put_in_order(
    device: int, training: Training, tmp_path: Path
) -> None:
    """What it is to look after lies elsewhere; the copies that are still going on are no concern of the host's."""
    second = state(2.0)
    others = {value.data_ptr() for value in second.values() if isinstance(value, torch.Tensor)}
    training.on = lambda storage: device if storage.data_ptr() in others else 0
    training.cuda.hold_copies(True)
    before = ckpt.save(state(), tmp_path / "a.pt", lazy=True, options=options(timeout_s=20.0))
    ckpt.fence()
    after = ckpt.save(second, tmp_path / "b.pt", lazy=True, options=options(timeout_s=20.0))
    ckpt.fence()
    assert before.captured and after.captured and not before.done()
    training.cuda.hold_copies(False)
    assert_same(state(), torch.load(before.result(30)))
    assert_same(second, torch.load(after.result(30)))
    training.synchronize()


def test_a_copy_that_fails_fails_that_save_only(training: Training, tmp_path: Path) -> None:
    with ckpt.Checkpointer(tmp_path, options=options()) as checkpointer:
        training.cuda.fail("cuMemcpyDtoHAsync", skip=20, late=True)  # behind the probes
        error = checkpointer.save(1, state(), lazy=True).exception(30)
        assert isinstance(error, DeviceError) and "ILLEGAL_ADDRESS" in str(error)
        checkpointer.save(2, state(2.0), lazy=True).result(30)
        found = checkpointer.restore()
        assert found is not None and found.step == 2
        assert_same(state(2.0), found.state)


def test_an_arena_that_is_not_pinned_is_told_once(
    training: Training, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    inspection.forget_notices()
    training.cuda.fail("cuMemHostRegister", code=2)
    for value in (1.0, 2.0):
        ckpt.save(state(value), tmp_path / "a.pt", lazy=True, options=options()).result(30)
        assert_same(state(value), torch.load(tmp_path / "a.pt"))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "ulimit -l" in record.getMessage() and "cuMemHostRegister on CUDA device 0 failed" in record.getMessage()


def test_without_a_driver(training: Training, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(training, "driver", str(tmp_path / "libcuda-that-is-not-there.so"))
    with pytest.raises(DeviceError, match="libcuda-that-is-not-there"):
        ckpt.save(state(), tmp_path / "a.pt", options=options())
    monkeypatch.setattr(torch_devices, "in_use", torch_devices.TorchDevices())
    ckpt.save(state(), tmp_path / "a.pt", options=options()).result(30)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".tmp-")]


# ---- changes before the fence ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", ["layer 5", "small", None])
def test_verify_capture_looks_at_devices(changed: str | None, training: Training, native: Any, tmp_path: Path) -> None:
    """The arena holds little of it and is written slowly: when save() returns, the end of the state has not left yet."""
    native.set_fault("pwritev", delay_s=0.1)
    current = state(count=40)
    if changed is not None:
        current[changed] = current.pop(changed)  # the last
    how = options(verify_capture=True, arena_bytes="1MiB", chunk_bytes="256KiB", writers=1)
    pending = ckpt.save(current, tmp_path / "a.pt", lazy=True, options=how)
    if changed is not None:
        current[changed].numpy()[3] = 7.0  # which no version counter sees
        ckpt.fence()
        with pytest.raises(CaptureError, match=rf"{changed} \(float32.*ckpt\.fence"):
            pending.result(30)
        assert not pending.path.exists()
        return
    ckpt.fence()
    for value in current.values():
        if isinstance(value, torch.Tensor):
            training.fill(value, 0xEE)
    assert_same(state(count=40), ckpt.load(pending.result(30)))
    training.synchronize()


@pytest.mark.parametrize("seed", range(4))
def test_verify_capture_passes_what_is_fenced(seed: int, training: Training, tmp_path: Path) -> None:
    """Lazy and eager, on devices and on the host, in the same chunks; kernels write behind the fence, and to eager at once."""
    training.cuda.configure(seed=seed, most_delay_s=0.005)
    places = {}
    training.on = lambda storage: places.get(storage.data_ptr(), HOST)
    torch.manual_seed(seed)
    for turn in range(3):
        tensors = {str(number): torch.randn(int(torch.randint(1, 30_000, ()))) for number in range(40)}
        places.update({tensor.data_ptr(): number % 3 - 1 for number, tensor in enumerate(tensors.values())})
        lazy = [tensor for number, tensor in enumerate(tensors.values()) if number % 5]
        expected = {name: tensor.clone() for name, tensor in tensors.items()}
        pending = ckpt.save(tensors, tmp_path / f"{turn}.pt", lazy=lazy, options=options(verify_capture=True))
        for number, tensor in enumerate(tensors.values()):
            if number % 5 == 0 and places[tensor.data_ptr()] != HOST:
                training.fill(tensor, 0xEE, places[tensor.data_ptr()])
        ckpt.fence()
        for tensor in lazy:
            if places[tensor.data_ptr()] != HOST:
                training.fill(tensor, 0xEE, places[tensor.data_ptr()])
        assert_same(expected, torch.load(pending.result(30)))
        training.synchronize()


def test_what_cannot_be_verified_is_not_saved(training: Training, tmp_path: Path) -> None:
    training.cuda.fail("cuMemcpyDtoHAsync", skip=2)
    with pytest.raises(DeviceError, match=r"a\.pt.*ILLEGAL_ADDRESS"):
        ckpt.save(state(), tmp_path / "a.pt", lazy=True, options=options(verify_capture=True))
    ckpt.save(state(), tmp_path / "a.pt", lazy=True, options=options(verify_capture=True)).result(30)
    assert_same(state(), torch.load(tmp_path / "a.pt"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_save_does_not_hang_with_a_device_that_it_looks_at(training: Training, tmp_path: Path) -> None:
    how = options(verify_capture=True, timeout_s=0.3)
    ckpt.save(state(), tmp_path / "a.pt", lazy=True, options=how).result(30)
    training.cuda.hold_copies(True)
    pending = ckpt.save(state(2.0), tmp_path / "a.pt", lazy=True, options=how)
    ckpt.fence()
    assert pending.captured and not pending.done()
    training.cuda.hold_copies(False)
    with pytest.raises(DeadlineError, match=r"a\.pt.*CUDA device 0 did not end within 0\.3"):
        pending.result(30)
    assert_same(state(), torch.load(tmp_path / "a.pt"))
    ckpt.save(state(3.0), tmp_path / "a.pt", lazy=True, options=how).result(30)
    assert_same(state(3.0), torch.load(tmp_path / "a.pt"))
