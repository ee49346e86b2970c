"""Streams that are being captured into a CUDA graph: a copy there would be recorded instead of made, so it is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


# ---- steps that a graph replays --------------------------------------------------------------------------------------


class Replayed(torch.optim.Optimizer):
    """Its step fills its parameters and state by kernels; a replay of its capture does the same, and calls nothing of ours."""

    def __init__(self, training: Training, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__(parameters, {})
        self.training, self.value = training, 1
        for parameter in parameters:
            self.state[parameter] = {"momentum": torch.zeros_like(parameter)}

    def step(self, closure: Any = None) -> None:
        if not self.training.is_capturing():
            self.replay()

    def replay(self) -> None:
        for parameter, its in self.state.items():
            self.training.fill(parameter, self.value)
            self.training.fill(its["momentum"], self.value)


def warmed_up_and_captured(training: Training) -> tuple[torch.nn.Linear, Replayed]:
    model = torch.nn.Linear(200, 300)
    optimizer = Replayed(training, list(model.parameters()))
    optimizer.step()
    with capture(training):
        optimizer.step()
    optimizer.value = 0xEE
    training.synchronize()
    return model, optimizer


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    tensors = [*model.parameters(), *(its["momentum"] for its in optimizer.state.values())]
    return {str(number): tensor.detach() for number, tensor in enumerate(tensors)}


@pytest.mark.parametrize("named", ["nothing", "optimizer"])
@pytest.mark.parametrize("again", [False, True])
def test_what_a_replay_writes_is_copied_inside_save(
    again: bool, named: str, training: Training, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also when the optimizer steps without the graph later, and where another optimizer owns the tensors, too."""
    model, optimizer = warmed_up_and_captured(training)
    if again:
        optimizer.value = 1
        optimizer.step()
        other = Replayed(training, list(model.parameters()))
        other.step()
        optimizer.value = 0xEE
        training.synchronize()
    current = state_of(model, optimizer)
    expected = {name: tensor.clone() for name, tensor in current.items()}
    training.cuda.hold_copies(True)
    lazy = optimizer if named == "optimizer" else None
    pending = ckpt.save(current, tmp_path / "a.pt", lazy=lazy, options=options())
    optimizer.replay()
    training.cuda.hold_copies(False)
    assert_same(expected, torch.load(pending.result(30)))
    training.synchronize()
    (record,) = [record for record in caplog.records if "CUDA graph" in record.getMessage()]
    assert "Replayed" in record.getMessage() and record.levelname == "WARNING"


def test_what_is_declared_stays_lazy_and_is_fenced_by_hand(training: Training, tmp_path: Path) -> None:
    model, optimizer = warmed_up_and_captured(training)
    current = state_of(model, optimizer)
    expected = {name: tensor.clone() for name, tensor in current.items()}
    in_model = sum(tensor.nbytes for tensor in model.parameters())
    training.cuda.hold_copies(True)
    pending = ckpt.save(current, tmp_path / "a.pt", lazy=model, options=options())
    ckpt.fence()
    optimizer.replay()
    training.cuda.hold_copies(False)
    assert_same(expected, torch.load(pending.result(30)))
    eager = pending.stats.bytes_copied_in_save
    assert in_model <= eager < 2 * in_model, "the state alone, of the same size"
    training.synchronize()


def test_other_optimizers_stay_lazy(training: Training, tmp_path: Path) -> None:
    warmed_up_and_captured(training)
    model = torch.nn.Linear(200, 300)
    optimizer = Replayed(training, list(model.parameters()))
    optimizer.step()
    training.synchronize()
    pending = ckpt.save(model.state_dict(), tmp_path / "a.pt", options=options())
    ckpt.fence()
    assert pending.stats.bytes_copied_in_save < 10_000
    pending.result(30)
