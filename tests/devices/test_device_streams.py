"""Training that computes on several streams of a device: each that may write waits for the copies that are still going on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from device_training import Training, cuda, fake_library, options, training
from support import assert_same

import ckpt
from ckpt.devices import HOST

__all__ = ["cuda", "fake_library", "training"]

SPOILT = 0xEE
PAUSE_S = 0.02  # for kernels that nothing holds up


class Filling(torch.optim.Optimizer):
    """Its step fills its parameter by a kernel of the current stream."""

    def __init__(self, training: Training, parameter: torch.nn.Parameter) -> None:
        super().__init__([parameter], {})
        self.training, self.value = training, 1

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            self.training.fill(parameter, self.value)


def learners(training: Training, count: int) -> list[Filling]:
    """All have stepped, so what they own is lazy."""
    made = [Filling(training, torch.nn.Parameter(torch.zeros(60_000))) for _ in range(count)]
    for learner in made:
        learner.step()
        learner.value = SPOILT
    training.synchronize()
    return made


def weights_of(learners: list[Filling]) -> dict[str, torch.Tensor]:
    return {str(number): learner.param_groups[0]["params"][0] for number, learner in enumerate(learners)}


def test_optimizers_on_streams_of_their_own(training: Training, tmp_path: Path) -> None:
    """The first step seals the save; the second comes while its copies are still going on."""
    pair = learners(training, 2)
    weights = weights_of(pair)
    expected = {name: tensor.detach().clone() for name, tensor in weights.items()}
    first, second = training.streams[0], training.cuda.stream(0)
    training.cuda.hold_copies(True)
    pending = ckpt.save({name: tensor.detach() for name, tensor in weights.items()}, tmp_path / "a.pt", options=options())
    pair[0].step()
    assert pending.captured
    training.streams[0] = second
    pair[1].step()
    time.sleep(PAUSE_S)
    assert_same(expected["1"], weights["1"].detach())
    training.cuda.hold_copies(False)
    assert_same(expected, torch.load(pending.result(30)))
    for stream in (first, second):
        training.cuda.synchronize(0, stream)
    assert int(weights["1"].detach().view(torch.uint8).min()) == SPOILT


@pytest.mark.parametrize("lazy", [True, False])
def test_fences_by_hand_on_one_stream_after_the_other(lazy: bool, training: Training, tmp_path: Path) -> None:
    """What was copied on the stream of save() itself is put in order, too."""
    current = {str(number): torch.full((60_000,), float(number)) for number in range(3)}
    expected = {name: tensor.clone() for name, tensor in current.items()}
    first = training.streams[0]
    training.cuda.hold_copies(True)
    pending = ckpt.save(current, tmp_path / "a.pt", lazy=lazy, options=options())
    ckpt.fence()
    assert pending.captured
    others = [training.cuda.stream(0) for _ in range(2)]
    for number, stream in enumerate(others):
        training.streams[0] = stream
        ckpt.fence()
        training.fill(current[str(number)], SPOILT)
    time.sleep(PAUSE_S)
    assert_same(expected, current)
    training.cuda.hold_copies(False)
    assert_same(expected, torch.load(pending.result(30)))
    for stream in (first, *others):
        training.cuda.synchronize(0, stream)


def test_a_stream_that_is_captured_meanwhile_is_left_alone(training: Training, tmp_path: Path) -> None:
    """What is recorded there is not done now. The other device's stream is put in order all the same."""
    current = {str(number): torch.full((60_000,), float(number)) for number in range(2)}
    expected = {name: tensor.clone() for name, tensor in current.items()}
    places = {tensor.data_ptr(): int(name) for name, tensor in current.items()}
    training.on = lambda storage: places.get(storage.data_ptr(), HOST)
    training.cuda.hold_copies(True)
    pending = ckpt.save(current, tmp_path / "a.pt", lazy=True, options=options())
    ckpt.fence()
    before = dict(training.streams)
    training.streams = {device: training.cuda.stream(device) for device in (0, 1)}
    training.cuda.set_capturing(0, training.streams[0], True)
    ckpt.fence()
    training.cuda.set_capturing(0, training.streams[0], False)
    training.fill(current["1"], SPOILT, 1)
    time.sleep(PAUSE_S)
    assert_same(expected, current)
    training.cuda.hold_copies(False)
    assert_same(expected, torch.load(pending.result(30)))
    for device, stream in (*before.items(), *training.streams.items()):
        training.cuda.synchronize(device, stream)


def test_nothing_is_asked_of_the_driver_once_all_copies_have_ended(training: Training, tmp_path: Path) -> None:
    """Though somebody still holds the save."""
    pending = ckpt.save({"a": torch.zeros(60_000)}, tmp_path / "a.pt", lazy=True, options=options())
    ckpt.fence()
    pending.result(30)
    ckpt.fence()
    training.cuda.configure()
    ckpt.fence()
    assert training.cuda.count("cuStreamIsCapturing") == training.cuda.count("cuCtxGetCurrent") == 0
