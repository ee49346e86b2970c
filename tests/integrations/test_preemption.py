"""Preemption by hand, beside a plain Checkpointer."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from support import DEADLINE_S, options

import ckpt
from ckpt.integrations.torch import Preempted, Preemption

pytestmark = pytest.mark.usefixtures("native")


def test_a_loop_of_ones_own_saves_and_ends(tmp_path: Path) -> None:
    handler, weights = signal.getsignal(signal.SIGTERM), torch.zeros(5_000)
    with (
        pytest.raises(Preempted) as raised,
        ckpt.Checkpointer(tmp_path, options=options()) as checkpointer,
        Preemption(DEADLINE_S) as preemption,
    ):
        for step in range(1, 6):
            weights += 1
            if preemption.is_due():
                checkpointer.save(step, {"weights": weights}).result(preemption.left_s())
                preemption.end(step)
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("end() must end training")
    assert (raised.value.code, raised.value.step) == (143, 4)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert ckpt.load(tmp_path)["weights"].unique().tolist() == [4.0]


def test_without_a_signal_the_handler_is_put_back() -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with Preemption("2min") as preemption:
        assert signal.getsignal(signal.SIGTERM) is not handler
        assert not preemption.is_due() and not preemption.noted and preemption.left_s() == 120.0
    assert signal.getsignal(signal.SIGTERM) is handler


def test_what_is_no_grace() -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="grace must be"):
        Preemption("soon")
    assert signal.getsignal(signal.SIGTERM) is handler
