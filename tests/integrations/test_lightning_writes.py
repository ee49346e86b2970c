"""LazyCheckpointIO where names lead elsewhere, hooks write to weights, and fit() runs while something else has failed."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support import DEADLINE_S, assert_same, options

pytest.importorskip("lightning", reason="lightning is not installed")

import lightning.pytorch as pl
from lightning_models import Model, ScalesRows, batches, trainer

from ckpt.errors import StorageError
from ckpt.integrations.lightning import LazyCheckpointIO

pytestmark = pytest.mark.filterwarnings("ignore:::lightning")


def test_a_link_leads_where_it_did_until_what_is_saved_over_it_is_durable(tmp_path: Path, native: Any) -> None:
    plugin = LazyCheckpointIO(options())
    old, link = tmp_path / "1.ckpt", tmp_path / "last.ckpt"
    plugin.save_checkpoint({"step": 1}, old)
    os.symlink("1.ckpt", link)
    native.set_fault("fdatasync", error=errno.ENOSPC)
    with plugin.training_goes_on():
        plugin.save_checkpoint({"step": 2}, link)
        with pytest.raises(StorageError):
            plugin.wait()
        assert os.readlink(link) == "1.ckpt"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["1.ckpt", "last.ckpt"]
        native.clear_faults()
        for step in (3, 4):
            native.set_fault("fdatasync", delay_s=0.1)
            plugin.save_checkpoint({"step": step}, link)
        assert torch.load(link)["step"] in (1, 3)
        plugin.wait()
    assert torch.load(link) == {"step": 4} and torch.load(old) == {"step": 1} and not link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.ckpt", "last.ckpt"]


def test_an_error_that_is_being_handled_outside_does_not_hide_that_of_the_last_save(tmp_path: Path, native: Any) -> None:
    native.set_fault("fdatasync", path_part="2.ckpt", error=errno.EIO)
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        with pytest.raises(StorageError, match=r"2\.ckpt"):
            trainer(tmp_path, LazyCheckpointIO(options()), steps=2).fit(Model(), batches(2))


def test_hooks_before_a_step_that_write_to_weights_train_as_without_it(tmp_path: Path) -> None:
    def decayed(parameters: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(parameters, lr=0.1)

        @torch.no_grad()
        def decay(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(0.9)

        optimizer.register_step_pre_hook(decay)
        return optimizer

    stock, lazy = Model(decayed), Model(decayed)
    trainer(tmp_path / "stock", steps=3).fit(stock, batches(3))
    trainer(tmp_path / "lazy", LazyCheckpointIO(options()), steps=3).fit(lazy, batches(3))
    assert_same(stock.state_dict(), lazy.state_dict())


def test_a_forward_that_writes_between_two_steps_finds_nothing_in_flight(tmp_path: Path, native: Any) -> None:
    """With accumulated gradients, forwards run that no step of the optimizer comes before."""
    expected: dict[int, Any] = {}

    class Rows(ScalesRows):
        looked_up = 0

        def loss(self, step: int) -> torch.Tensor:
            self.looked_up += 1  # other rows each time: they have grown meanwhile
            return (
                Model.loss(self, step) + self.rows(torch.arange(self.looked_up * 10, self.looked_up * 10 + 10)).square().mean()
            )

    class Saves(pl.Callback):
        def on_train_batch_end(self, made: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
            if made.global_step and made.global_step not in expected:
                state = module.state_dict()
                expected[made.global_step] = {name: value.clone() for name, value in state.items()}
                native.set_fault("pwritev", delay_s=0.05)
                made.save_checkpoint(tmp_path / f"{made.global_step}.ckpt")

    more: Any = {"callbacks": [Saves()], "checkpoint": {"save_top_k": 0}, "accumulate_grad_batches": 3}
    trainer(tmp_path, LazyCheckpointIO(options()), steps=2, **more).fit(Rows(), batches(6))
    for step, state in expected.items():
        assert_same(dict(torch.load(tmp_path / f"{step}.ckpt", weights_only=False)["state_dict"]), state)


def test_what_is_saved_as_fit_ends_is_there_when_the_call_returns(tmp_path: Path, native: Any) -> None:
    """Nobody waits for it then; in the next training of the same trainer somebody does again."""
    there: list[bool] = []

    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            native.set_fault("fdatasync", delay_s=DEADLINE_S)
            self._save(trainer, f"{trainer.global_step}.ckpt")
            native.clear_faults()

        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            native.set_fault("fdatasync", delay_s=0.2)
            self._save(trainer, "end.ckpt")

        def _save(self, trainer: Any, name: str) -> None:
            trainer.save_checkpoint(tmp_path / name)
            there.append((tmp_path / name).exists())

    made = trainer(tmp_path / "fit", LazyCheckpointIO(options()), steps=1, callbacks=[Saves()], enable_checkpointing=True)
    made.fit(Model(), batches(2))
    assert there == [False, True]
    made.fit_loop.epoch_loop.max_steps = 2
    made.fit(Model(), batches(2))
    assert there == [False, True, False, True]
