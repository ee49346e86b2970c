"""LazyCheckpointIO in a Trainer: each checkpoint holds what Lightning's own would hold, whatever writes to the weights."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from places import PYTHONPATH
from support import DEADLINE_S, assert_same, options
from torch.optim.optimizer import register_optimizer_step_pre_hook

pytest.importorskip("lightning", reason="lightning is not installed")

from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning_models import Model, SavesOlderWeights, ScalesRows, Sharpness, TwoOptimizers, batches, trainer

import ckpt
from ckpt.errors import CheckpointError, CorruptError, FailedSavesError, StorageError, UnsupportedError
from ckpt.integrations.lightning import LazyCheckpointIO, lightning_private, patch
from ckpt.integrations.lightning.closures import calls_closure_first

STEPS = 5
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")


@pytest.fixture
def plugin() -> Iterator[LazyCheckpointIO]:
    yield LazyCheckpointIO(options())


def contents(directory: Path) -> dict[str, Any]:
    """Of all checkpoints there, without the name of the directory."""
    found = {path.name: torch.load(path, weights_only=False) for path in sorted(directory.glob("*.ckpt"))}
    renamed = _rename(found, str(directory))
    assert isinstance(renamed, dict)
    return renamed


def _rename(value: Any, directory: str) -> Any:
    if isinstance(value, str):
        return value.replace(directory, "...")
    if isinstance(value, dict):
        renamed = {_rename(key, directory): _rename(item, directory) for key, item in value.items()}
        return type(value)(renamed) if type(value) in (dict,) else value.__class__(renamed)
    return value


# ---- what is in them -------------------------------------------------------------------------------------------------


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)


def lbfgs(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters, lr=0.1, max_iter=3)


def sharpness(parameters: Any) -> torch.optim.Optimizer:
    return Sharpness(parameters, lr=1e-2, momentum=0.9)


VALIDATES: dict[str, Any] = {"val_check_interval": 1, "limit_val_batches": 1}
WRITERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (Model, {"gradient_clip_val": 0.5}),
    "SGD, bfloat16": (lambda: Model(sgd), {"precision": "bf16-mixed"}),
    "accumulated gradients": (Model, {"accumulate_grad_batches": 2}),
    "LBFGS": (lambda: Model(lbfgs), {}),
    "an optimizer that writes before its closure": (lambda: Model(sharpness), {}),
    "a forward that writes": (ScalesRows, {}),
    "two optimizers by hand": (TwoOptimizers, {"max_steps": 2 * STEPS}),
    "older weights": (SavesOlderWeights, {}),
    "swapped weights": (Model, {"callbacks": lambda: [EMAWeightAveraging(decay=0.5)], **VALIDATES}),
    "averaged weights": (
        Model,
        {
            "callbacks": lambda: [StochasticWeightAveraging(1e-2, swa_epoch_start=1)],
            "max_steps": -1,
            "max_epochs": 3,
            "limit_train_batches": 2,
        },
    ),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_each_checkpoint_holds_what_lightning_saves(
    writer: str, plugin: LazyCheckpointIO, tmp_path: Path, native: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Bytes leave late, so that whatever writes to them without a fence is found in them."""
    model, more = WRITERS[writer]
    data = batches(2 * STEPS)
    for directory, own in ((tmp_path / "stock", None), (tmp_path / "lazy", plugin)):
        if own is not None:
            native.set_fault("pwritev", delay_s=0.02)
        made = {"callbacks": more["callbacks"]()} if "callbacks" in more else {}
        trainer(directory, own, steps=STEPS, **({k: v for k, v in more.items() if k != "callbacks"} | made)).fit(
            model(), data, data if "val_check_interval" in more else None
        )
    stock, lazy = contents(tmp_path / "stock"), contents(tmp_path / "lazy")
    assert (
        len(lazy) >= STEPS - 1
        and [each.message for each in caplog.records if each.name == "ckpt" and each.levelno >= logging.ERROR] == []
    )
    assert_same(stock, lazy)


def test_bytes_leave_until_forward_and_backward_have_run(plugin: LazyCheckpointIO, tmp_path: Path, native: Any) -> None:
    """Nothing has been written or copied when the backward has run, and all has when the step has."""
    saved: list[ckpt.PendingSave] = []
    seen: list[tuple[str, bool]] = []
    real = ckpt.save

    def save(*args: Any, **kwargs: Any) -> ckpt.PendingSave:
        if not saved:
            native.set_fault("pwritev", delay_s=DEADLINE_S)
        saved.append(real(*args, **kwargs))
        return saved[-1]

    def look(what: str, step: int) -> None:
        if step >= 1:
            seen.append((what, saved[0].captured))
            if what == "backward":
                native.clear_faults()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ckpt, "save", save)
        trainer(tmp_path, plugin, steps=3).fit(Model(seen=look), batches(3))
    assert seen == [("forward", False), ("backward", False), ("forward", True), ("backward", True)]


@pytest.mark.parametrize("make", [lbfgs, sharpness])
def test_an_optimizer_that_is_not_known_is_fenced_before_its_closure(
    make: Any, plugin: LazyCheckpointIO, tmp_path: Path
) -> None:
    optimizer = make([torch.nn.Parameter(torch.zeros(1))])
    assert not calls_closure_first(optimizer)
    assert calls_closure_first(optimizer, (type(optimizer),))


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD, torch.optim.RMSprop, torch.optim.NAdam])
def test_optimizers_of_torch_call_their_closure_first(kind: Any) -> None:
    """Once, and before they write: with a scheduler around them, too."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = kind([weight], lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    before, calls = weight.detach().clone(), []

    def closure() -> torch.Tensor:
        calls.append(torch.equal(weight, before))
        weight.grad = torch.ones(3)
        return weight.sum()

    optimizer.step(closure)
    assert calls == [True] and not torch.equal(weight, before)
    assert calls_closure_first(optimizer)
    handle = register_optimizer_step_pre_hook(lambda *_: None)
    try:
        assert not calls_closure_first(optimizer), "a hook before the step of any optimizer may write to weights, too"
    finally:
        handle.remove()
    assert calls_closure_first(optimizer)
    changed: Any = optimizer
    changed.step = lambda closure=None: None
    assert not calls_closure_first(changed)


# ---- which of them there are -----------------------------------------------------------------------------------------

KEPT: dict[str, dict[str, Any]] = {
    "newest": {"save_top_k": 1, "every_n_train_steps": 1},
    "best two": {"save_top_k": 2, "monitor": "loss", "every_n_train_steps": 1, "save_last": True},
    "linked": {"save_top_k": 1, "every_n_train_steps": 1, "save_last": "link"},
    "one name": {"save_top_k": 3, "monitor": "loss", "mode": "max", "filename": "one", "every_n_train_steps": 1},
    "weights alone": {"save_top_k": 1, "every_n_train_steps": 2, "save_weights_only": True},
}


def listing(directory: Path) -> dict[str, str]:
    return {path.name: os.readlink(path) if path.is_symlink() else "" for path in directory.iterdir()}


@pytest.mark.parametrize("kept", KEPT)
def test_the_same_checkpoints_are_there_in_the_end(kept: str, plugin: LazyCheckpointIO, tmp_path: Path, native: Any) -> None:
    """However long each is under way."""
    for directory, own in ((tmp_path / "stock", None), (tmp_path / "lazy", plugin)):
        if own is not None:
            native.set_fault("fdatasync", delay_s=0.03)
        trainer(directory, own, steps=STEPS, checkpoint=KEPT[kept]).fit(Model(), batches(STEPS))
        trainer(directory, own, steps=2, checkpoint=KEPT[kept]).fit(Model(), batches(2))  # beside those
    assert listing(tmp_path / "stock") == listing(tmp_path / "lazy")
    assert_same(contents(tmp_path / "stock"), contents(tmp_path / "lazy"))


def test_while_the_newest_is_in_flight_the_one_before_is_there(plugin: LazyCheckpointIO, tmp_path: Path, native: Any) -> None:
    seen: list[set[str]] = []

    def look(what: str, step: int) -> None:
        if what == "backward" and step in (1, 2):
            if step == 1:
                plugin.wait()
                native.set_fault("fdatasync", delay_s=DEADLINE_S)
            else:
                seen.append({name for name in listing(tmp_path) if not name.startswith(".")})
                assert torch.load(tmp_path / "last.ckpt", weights_only=False)["global_step"] == 1
                native.clear_faults()

    keep = {"save_top_k": 1, "every_n_train_steps": 1, "save_last": "link", "filename": "{step}"}
    trainer(tmp_path, plugin, steps=3, checkpoint=keep).fit(Model(seen=look), batches(3))
    assert seen == [{"step=1.ckpt", "last.ckpt"}]
    assert listing(tmp_path) == {"step=3.ckpt": "", "last.ckpt": "step=3.ckpt"}


def test_a_link_that_is_saved_to_is_replaced_and_not_what_it_leads_to(plugin: LazyCheckpointIO, tmp_path: Path) -> None:
    first = trainer(tmp_path, plugin, steps=1, checkpoint={"save_last": "link", "filename": "{step}"})
    first.fit(Model(), batches(1))
    before = (tmp_path / "step=1.ckpt").read_bytes()
    first.save_checkpoint(tmp_path / "last.ckpt")
    assert (tmp_path / "step=1.ckpt").read_bytes() == before and not (tmp_path / "last.ckpt").is_symlink()


# ---- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["stock", "lazy"])
def test_either_resumes_from_what_the_other_has_saved(first: str, tmp_path: Path) -> None:
    whole = Model()
    trainer(tmp_path / "whole", steps=STEPS).fit(whole, batches(STEPS))
    plugins = {"stock": None, "lazy": LazyCheckpointIO(options())}
    trainer(tmp_path / first, plugins[first], steps=3).fit(Model(), batches(STEPS))
    second = next(name for name in plugins if name != first)
    resumed = Model()
    saved = tmp_path / first / "3.ckpt"
    trainer(tmp_path / second, plugins[second], steps=STEPS).fit(resumed, batches(STEPS), ckpt_path=saved, weights_only=False)
    assert resumed.global_step == STEPS
    assert_same(whole.state_dict(), resumed.state_dict())


def test_a_load_waits_for_the_save_before_it(plugin: LazyCheckpointIO, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    with plugin.training_goes_on():
        plugin.save_checkpoint({"a": torch.arange(5000)}, path)
        assert torch.equal(plugin.load_checkpoint(path)["a"], torch.arange(5000))
        plugin.remove_checkpoint(path)
        with pytest.raises(FileNotFoundError, match=r"a\.ckpt"):
            plugin.load_checkpoint(path)


def test_what_is_saved_outside_of_fit_is_there_when_the_call_returns(plugin: LazyCheckpointIO, tmp_path: Path) -> None:
    made = trainer(tmp_path / "fit", plugin, steps=1)
    made.fit(Model(), batches(1))
    made.save_checkpoint(tmp_path / "by hand" / "a.ckpt")
    assert torch.load(tmp_path / "by hand" / "a.ckpt", weights_only=False)["global_step"] == 1


def test_a_checkpoint_for_slurm_is_there_when_the_call_returns(plugin: LazyCheckpointIO, tmp_path: Path) -> None:
    with plugin.training_goes_on():
        plugin.save_checkpoint({"a": 1}, tmp_path / "hpc_ckpt_1.ckpt")
        assert (tmp_path / "hpc_ckpt_1.ckpt").exists()


def test_damage_is_found(plugin: LazyCheckpointIO, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    plugin.save_checkpoint({"a": torch.zeros(100_000)}, path)
    content = bytearray(path.read_bytes())
    content[200_000] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptError):
        plugin.load_checkpoint(path)


# ---- failures --------------------------------------------------------------------------------------------------------


def test_a_save_that_fails_does_not_stop_the_training_and_costs_no_checkpoint(
    plugin: LazyCheckpointIO, tmp_path: Path, native: Any, caplog: pytest.LogCaptureFixture
) -> None:
    native.set_fault("fdatasync", path_part="2.ckpt", error=errno.EIO)
    keep = {"save_top_k": 1, "every_n_train_steps": 1, "filename": "{step}", "auto_insert_metric_name": False}

    def look(what: str, step: int) -> None:
        if (what, step) == ("backward", 2):
            with pytest.raises(StorageError):
                plugin.wait()
            assert list(listing(tmp_path)) == ["1.ckpt"]

    trainer(tmp_path, plugin, steps=3, checkpoint=keep).fit(Model(seen=look), batches(3))
    assert list(listing(tmp_path)) == ["3.ckpt"]
    assert any("2.ckpt" in record.message and record.levelno == logging.ERROR for record in caplog.records)


def test_too_many_failures_in_a_row_stop_it(tmp_path: Path, native: Any) -> None:
    native.set_fault("fdatasync", error=errno.ENOSPC)
    plugin = LazyCheckpointIO(options(max_failed_saves=2))
    done: list[int] = []

    def look(what: str, step: int) -> None:
        done.append(step)
        plugin._paths.wait()

    with pytest.raises(FailedSavesError, match="the last 2 checkpoints could not be saved"):
        trainer(tmp_path, plugin, steps=9).fit(Model(seen=look), batches(9))
    assert max(done) == 2


def test_the_end_of_fit_raises_what_the_last_save_died_of(plugin: LazyCheckpointIO, tmp_path: Path, native: Any) -> None:
    native.set_fault("fdatasync", path_part="3.ckpt", error=errno.EIO)
    with pytest.raises(StorageError, match=r"3\.ckpt"):
        trainer(tmp_path, plugin, steps=3).fit(Model(), batches(3))
    native.clear_faults()
    trainer(tmp_path, plugin, steps=3).fit(Model(), batches(3))  # once


def test_another_error_is_not_hidden_by_that_of_a_save(plugin: LazyCheckpointIO, tmp_path: Path, native: Any) -> None:
    native.set_fault("fdatasync", error=errno.EIO)

    def fail(what: str, step: int) -> None:
        if step == 2:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, plugin, steps=3).fit(Model(seen=fail), batches(3))


def test_a_path_that_cannot_be_saved_to_is_a_failed_save(plugin: LazyCheckpointIO, tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").mkdir()
    with pytest.raises(StorageError, match="it is a directory"):
        plugin.save_checkpoint({}, tmp_path / "a.ckpt")
    with plugin.training_goes_on():
        plugin.save_checkpoint({}, tmp_path / "a.ckpt")
        with pytest.raises(StorageError, match="it is a directory"):
            plugin.wait()


def test_what_is_older_than_a_failed_save_is_not_loaded_for_it(plugin: LazyCheckpointIO, tmp_path: Path, native: Any) -> None:
    path = tmp_path / "last.ckpt"
    plugin.save_checkpoint({"step": 1}, path)
    native.set_fault("fdatasync", error=errno.EIO)
    with plugin.training_goes_on():
        plugin.save_checkpoint({"step": 2}, path)
        with pytest.raises(CheckpointError, match="what is there is older"):
            plugin.load_checkpoint(path)
        native.clear_faults()
        plugin.save_checkpoint({"step": 3}, path)
        assert plugin.load_checkpoint(path) == {"step": 3}


# ---- the rest --------------------------------------------------------------------------------------------------------


def test_other_places_than_local_ones_are_left_to_lightning(
    plugin: LazyCheckpointIO, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        plugin.save_checkpoint({"a": 1}, "memory://a.ckpt")
        assert plugin.load_checkpoint("memory://a.ckpt") == {"a": 1}
    assert [record.levelname for record in caplog.records if "memory://" in record.message] == ["WARNING"]
    plugin.remove_checkpoint("memory://a.ckpt")
    with pytest.raises(FileNotFoundError):
        plugin.load_checkpoint("memory://a.ckpt")
    plugin.save_checkpoint({"a": 2}, f"file://{tmp_path}/a.ckpt")
    assert torch.load(tmp_path / "a.ckpt") == {"a": 2}
    with pytest.raises(TypeError, match="storage_options"):
        plugin.save_checkpoint({}, tmp_path / "b.ckpt", storage_options={})


def test_figures_go_to_the_loggers(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    plugin = LazyCheckpointIO(options(), log_figures=True)
    logger = CSVLogger(tmp_path, "log", "one")
    trainer(tmp_path, plugin, steps=2, logger=logger).fit(Model(), batches(2))
    logger.save()
    header, *rows = (tmp_path / "log" / "one" / "metrics.csv").read_text().splitlines()
    column = header.split(",").index("checkpoint/bytes")
    assert len([row for row in rows if float(row.split(",")[column] or 0) > 100_000]) == 2


def test_it_goes_to_another_process_without_what_is_in_flight(plugin: LazyCheckpointIO, tmp_path: Path) -> None:
    other = pickle.loads(pickle.dumps(plugin))
    assert other.options == plugin.options and other._paths is not plugin._paths
    other.save_checkpoint({"a": 1}, tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt") == {"a": 1}


def test_others_trainers_are_as_they_were(tmp_path: Path) -> None:
    trainer(tmp_path, AsyncCheckpointIO(), steps=2).fit(Model(), batches(2))
    assert sorted(listing(tmp_path)) == ["1.ckpt", "2.ckpt"]


def test_a_lightning_without_the_seams_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch, "_done", set())
    monkeypatch.setitem(
        lightning_private.SEAMS, "file_exists", lightning_private.Seam("trainer.trainer", "Trainer", "no_more", ())
    )
    with pytest.raises(UnsupportedError, match=rf"has no Trainer\.no_more.*tested with {lightning_private.TESTED}"):
        LazyCheckpointIO()
    other = lightning_private.Seam("trainer.trainer", "Trainer", "fit", ("self", "no_such_argument"))
    monkeypatch.setitem(lightning_private.SEAMS, "file_exists", other)
    with pytest.raises(UnsupportedError, match="no_such_argument"):
        LazyCheckpointIO()


def test_fabric_saves_lazily_and_loads_what_it_has_saved(plugin: LazyCheckpointIO, tmp_path: Path, native: Any) -> None:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1, plugins=[plugin, LightningEnvironment()])
    model: Any = torch.nn.Linear(100, 100)
    optimizer: Any = torch.optim.AdamW(model.parameters())
    model, optimizer = fabric.setup(model, optimizer)
    native.set_fault("pwritev", delay_s=0.02)
    for step in range(3):
        fabric.backward(model(torch.ones(2, 100)).sum())
        optimizer.step()
        weight = model.weight.detach().clone()
        fabric.save(tmp_path / "a.ckpt", {"model": model, "optimizer": optimizer, "step": step})
    fabric.backward(model(torch.ones(2, 100)).sum())
    optimizer.step()
    assert fabric.load(tmp_path / "a.ckpt", {"model": model, "optimizer": optimizer})["step"] == 2
    assert torch.equal(model.weight, weight)


def test_the_tuner_saves_and_restores(plugin: LazyCheckpointIO, tmp_path: Path, native: Any) -> None:
    """It trains from a checkpoint that it has just saved, loads that again, and removes it."""
    from lightning.pytorch.tuner import Tuner

    class Tuned(Model):
        lr = 1e-3

    native.set_fault("pwritev", delay_s=0.02)
    found = {}
    for name, own in (("stock", None), ("lazy", plugin)):
        model = Tuned(sgd)
        made = trainer(tmp_path / name, own, steps=20, enable_checkpointing=True)
        finder: Any = Tuner(made).lr_find(model, batches(30), num_training=4)
        found[name] = finder.results["loss"]
        assert_same(Tuned(sgd).state_dict(), model.state_dict())
        assert [path.name for path in (tmp_path / name).glob("*") if "lr_find" in path.name] == []
    assert found["stock"] == found["lazy"]


OTHER = """
import sys
import torch
import pytorch_lightning as pl
from ckpt.integrations.lightning import LazyCheckpointIO
assert "lightning" not in sys.modules

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 64)
    def training_step(self, batch, batch_idx):
        return self.layer(torch.ones(4, 64)).sum()
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())

def main():
    from pytorch_lightning.plugins.environments import LightningEnvironment
    keep = pl.callbacks.ModelCheckpoint(sys.argv[1], every_n_train_steps=1, filename="saved", save_last="link")
    pl.Trainer(
        accelerator="cpu", devices=int(sys.argv[3]), strategy=sys.argv[2], max_steps=3, logger=False, callbacks=[keep],
        plugins=[LazyCheckpointIO(), LightningEnvironment()], enable_progress_bar=False, enable_model_summary=False,
    ).fit(Model(), torch.utils.data.DataLoader(range(8), batch_size=None))

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "devices"), [("auto", 1), ("ddp_spawn", 2)])
def test_pytorch_lightning_takes_it_too_also_for_ranks_that_it_spawns(strategy: str, devices: int, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(OTHER)
    command = [sys.executable, str(script), str(tmp_path / "saved"), strategy, str(devices)]
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    done = subprocess.run(command, capture_output=True, text=True, timeout=3 * DEADLINE_S, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert listing(tmp_path / "saved") == {"saved.ckpt": "", "last.ckpt": "saved.ckpt"}
    assert torch.load(tmp_path / "saved" / "last.ckpt", weights_only=False)["global_step"] == 3
