"""Streams that are being captured into a CUDA graph: a copy there would be recorded instead of made, so it is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from device_training import Training, cuda, fake_library, options, state, training
from support import assert_same, wait_until

import ckpt
from ckpt.errors import DeviceError
from ckpt.saving import inspection

__all__ = ["cuda", "fake_library", "training"]

REFUSED = r"captured into a graph.*save outside of captures.*ckpt\.fence\(\) before a capture begins and before each replay"


@contextmanager
def capture(training: Training, device: int = 0) -> Iterator[None]:
    training.cuda.set_capturing(device, training.streams[device], True)
    try:
        yield
    finally:
        training.cuda.set_capturing(device, training.streams[device], False)


def learner(value: float = 1.0) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    weights = torch.nn.Parameter(torch.full((60_000,), value))
    weights.grad = torch.ones_like(weights)
    return weights, torch.optim.AdamW([weights], lr=0.1)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("lazy", [True, False])
def test_no_save_during_a_capture(training: Training, tmp_path: Path, lazy: bool, first: bool) -> None:
    if not first:
        ckpt.save(state(), tmp_path / "a.pt", lazy=lazy, options=options()).result(30)
    before = sorted(tmp_path.iterdir())
    with capture(training), pytest.raises(DeviceError, match=rf"device 0.*{REFUSED}"):
        ckpt.save(state(2.0), tmp_path / "a.pt", lazy=lazy, options=options())
    assert sorted(tmp_path.iterdir()) == before
    ckpt.save(state(3.0), tmp_path / "a.pt", lazy=lazy, options=options()).result(30)
    assert_same(state(3.0), torch.load(tmp_path / "a.pt"))


def test_a_capture_on_one_of_several_devices(training: Training, tmp_path: Path) -> None:
    """What counts is where the tensors lie."""
    on_second = state(1.0)
    addresses = {value.data_ptr() for value in on_second.values() if isinstance(value, torch.Tensor)}
    training.on = lambda storage: int(storage.data_ptr() in addresses)
    both = {"first": state(2.0), "second": on_second}
    with capture(training, device=1):
        ckpt.save(state(2.0), tmp_path / "a.pt", lazy=True, options=options()).result(30)
        with pytest.raises(DeviceError, match=rf"device 1.*{REFUSED}"):
            ckpt.save(both, tmp_path / "b.pt", lazy=True, options=options())
    training.cuda.hold_copies(True)
    pending = ckpt.save(both, tmp_path / "b.pt", lazy=True, options=options())
    with capture(training, device=1), pytest.raises(DeviceError, match=rf"device 1.*{REFUSED}"):
        ckpt.fence()
    training.cuda.hold_copies(False)
    ckpt.fence()
    assert_same(both, torch.load(pending.result(30)))


def test_the_default_stream_while_another_one_is_captured(training: Training, tmp_path: Path) -> None:
    """The driver does not tell then: it refuses the question."""
    training.cuda.fail("cuStreamIsCapturing", code=906)
    with pytest.raises(DeviceError, match=REFUSED):
        ckpt.save(state(), tmp_path / "a.pt", lazy=True, options=options())
    training.cuda.hold_copies(True)
    pending = ckpt.save(state(), tmp_path / "a.pt", lazy=True, options=options())
    training.cuda.fail("cuStreamIsCapturing", code=906)
    with pytest.raises(DeviceError, match=REFUSED):
        ckpt.fence()
    training.cuda.hold_copies(False)
    assert_same(state(), torch.load(pending.result(30)))


@pytest.mark.parametrize("by_hand", [True, False], ids=["by_hand", "by_the_hook"])
@pytest.mark.parametrize("enqueued", [True, False], ids=["all_enqueued", "most_waiting_for_room"])
def test_no_fence_during_a_capture(training: Training, tmp_path: Path, by_hand: bool, enqueued: bool) -> None:
    """An error in the hook stops the step before it writes."""
    weights, optimizer = learner()
    training.cuda.hold_copies(True)
    current = {"weights": weights, **state(count=3 if enqueued else 40)}
    expected = {"weights": weights.detach().clone(), **state(count=3 if enqueued else 40)}
    how = options(arena_bytes="8MiB" if enqueued else "1MiB")
    pending = ckpt.save(current, tmp_path / "a.pt", lazy=True, options=how)
    if enqueued:
        wait_until(lambda: inspection.files_of(pending)[0].job.captured, what="all copies to be enqueued")
    with capture(training), pytest.raises(DeviceError, match=rf"device 0.*{REFUSED}"):
        ckpt.fence() if by_hand else optimizer.step()
    assert not pending.captured and torch.equal(weights, expected["weights"])
    training.cuda.hold_copies(False)
    ckpt.fence()
    assert pending.captured
    assert_same({**expected, "weights": torch.nn.Parameter(expected["weights"])}, torch.load(pending.result(30)))


def test_what_is_fenced_before_does_not_disturb_a_capture(training: Training, tmp_path: Path) -> None:
    """As the message tells: although copies are still going on, the captured step's hook has nothing to do."""
    weights, optimizer = learner()
    training.cuda.hold_copies(True)
    pending = ckpt.save(state(), tmp_path / "a.pt", lazy=True, options=options())
    ckpt.fence()
    with capture(training):
        ckpt.fence()
        optimizer.step()
    assert not torch.equal(weights, torch.full_like(weights, 1.0))
    training.cuda.hold_copies(False)
    assert_same(state(), torch.load(pending.result(30)))
