"""The Trainer of transformers with lazy checkpoints, on one rank: files, names, waits, failures, what could write between."""

from __future__ import annotations

import errno
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support import DEADLINE_S, assert_same, clear_faults, options

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

from dist.trainer_training import STEPS, build, digest, network
from safetensors.torch import load_file
from torch import nn
from trainer_saves import FEW, At, damage, names_in, saves
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

import ckpt
from ckpt.errors import CorruptError, FailedSavesError
from ckpt.integrations.transformers import LazyTrainer


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What the Trainer of transformers leaves, and the digest of its last step."""
    where = tmp_path_factory.mktemp("stock")
    trainer = build(where, Trainer)
    trainer.train()
    return where, digest(trainer)


@pytest.fixture(scope="module")
def lazy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    where = tmp_path_factory.mktemp("lazy")
    trainer = build(where)
    trainer.train()
    return where, digest(trainer)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_files_are_those_of_the_trainer(stock: tuple[Path, str], lazy: tuple[Path, str]) -> None:
    assert names_in(lazy[0]) == names_in(stock[0]) == saves(*range(1, STEPS + 1))
    for step in (1, STEPS):
        ours, theirs = (where / f"checkpoint-{step}" for where in (lazy[0], stock[0]))
        assert names_in(ours) == names_in(theirs) | {"manifest.json"}
        assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            assert_same(torch.load(theirs / name, weights_only=False), torch.load(ours / name, weights_only=False))
        assert (ours / "config.json").read_text() == (theirs / "config.json").read_text()
        assert torch.load(ours / "training_args.bin", weights_only=False).max_steps == STEPS
        listed = {each["name"] for each in json.loads((ours / "manifest.json").read_text())["files"]}
        assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"} <= listed


def test_each_resumes_from_the_other(stock: tuple[Path, str], lazy: tuple[Path, str], tmp_path: Path) -> None:
    assert lazy[1] == stock[1]
    for kind, saved in ((Trainer, lazy[0]), (LazyTrainer, stock[0])):
        trainer = build(tmp_path / kind.__name__, kind)
        trainer.train(resume_from_checkpoint=str(saved / f"checkpoint-{STEPS - 2}"))
        assert digest(trainer) == stock[1]


def test_a_model_that_is_not_of_transformers(tmp_path: Path) -> None:
    trainer = build(tmp_path, model=Plain(), **FEW)
    trainer.train()
    state = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert_same({name: each.detach() for name, each in trainer.model.state_dict().items()}, in_order(state, trainer.model))


def in_order(state: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """As state_dict() has it: safetensors sorts them."""
    assert state.keys() == model.state_dict().keys()
    return {name: state[name] for name in model.state_dict()}


class Plain(nn.Module):
    """With a buffer that each forward changes, and a layer that does not learn."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.words, self.frozen = nn.Embedding(64, 64), nn.Linear(64, 64).requires_grad_(False)
        self.norm, self.out = nn.BatchNorm1d(64), nn.Linear(64, 64)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.norm(self.frozen(self.words(input_ids)).transpose(1, 2)).transpose(1, 2)
        logits = self.out(hidden)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


# ---- names -----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_gets_its_name_when_it_is_durable(native: Any, tmp_path: Path) -> None:
    seen: list[set[str]] = []

    def look(model: nn.Module) -> None:
        seen.append(names_in(tmp_path))
        assert get_last_checkpoint(str(tmp_path)) is None
        clear_faults()

    trainer = build(tmp_path, callbacks=[At(1, look)], **FEW)
    native.set_fault("fdatasync", delay_s=DEADLINE_S)
    trainer.train()
    assert seen == [set()] and names_in(tmp_path) == saves(1, 2, 3)
    assert {path.name for path in tmp_path.iterdir()} - saves(1, 2, 3) <= {".lock", ".names.lock"}


def test_most_leaves_straight_from_the_tensors(tmp_path: Path) -> None:
    records: list[Any] = []
    trainer = build(
        tmp_path,
        model=network(n_embd=256),
        checkpoint_metrics=[Sink(records)],
        callbacks=[At(2, lambda model: trainer.wait_for_checkpoints())],
        **FEW,
    )
    trainer.train()
    assert [record.step for record in records] == [1, 2, 3]
    stats = records[1].stats  # of the second; that of the first step finds no optimizer that has stepped
    assert stats.bytes_from_tensors > stats.bytes_total / 2


class Sink:
    def __init__(self, records: list[Any]) -> None:
        self._records = records

    def saved(self, record: Any) -> None:
        self._records.append(record)

    def close(self) -> None:
        pass


# ---- what could write to the bytes before they have left ---------------------------------------------------------------


def test_what_changes_after_the_save_is_saved_as_it_was(tmp_path: Path) -> None:
    """Buffers change in the next forward, and anybody may write to what no optimizer has."""
    expected: dict[str, Any] = {}

    def write(model: nn.Module) -> None:
        expected.update({name: each.detach().clone() for name, each in model.state_dict().items()})
        with torch.no_grad():
            for part in (model.frozen.weight, model.norm.running_mean, model.norm.num_batches_tracked):
                part.add_(1)

    trainer = build(tmp_path, model=Plain(), callbacks=[At(2, write)], **FEW)
    trainer.train()
    assert_same(expected, in_order(load_file(tmp_path / "checkpoint-2" / "model.safetensors"), trainer.model))


def test_a_write_to_a_parameter_without_a_fence_is_found(native: Any, caplog: Any, tmp_path: Path) -> None:
    def write(model: nn.Module) -> None:
        with torch.no_grad():
            model.get_input_embeddings().weight.add_(1)
        clear_faults()

    class Slow(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                native.set_fault("fdatasync", delay_s=DEADLINE_S)

    trainer = build(tmp_path, callbacks=[Slow(), At(2, write)], model=network(n_embd=256), **FEW)
    trainer.train()
    assert "checkpoint-2" not in names_in(tmp_path) and "transformer.wte.weight" in caplog.text


def test_a_write_behind_a_fence_is_fine(tmp_path: Path) -> None:
    expected: dict[str, Any] = {}

    def write(model: nn.Module) -> None:
        expected.update({name: each.detach().clone() for name, each in model.state_dict().items()})
        ckpt.fence()
        with torch.no_grad():
            model.get_input_embeddings().weight.add_(1)

    build(tmp_path, callbacks=[At(2, write)], **FEW).train()
    found = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(expected[name], each) for name, each in found.items())


class Moded(torch.optim.SGD):
    """As those that need no schedule: it changes the parameters whenever its mode changes."""

    training = True

    def train(self) -> None:
        self._switch(True)

    def eval(self) -> None:
        self._switch(False)

    @torch.no_grad()
    def _switch(self, training: bool) -> None:
        if training != self.training:
            self.training = training
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(1.0 if training else -1.0)


def test_optimizers_that_write_when_their_mode_changes(tmp_path: Path) -> None:
    model = network()
    expected: dict[str, torch.Tensor] = {}

    def note(model: nn.Module) -> None:
        expected.update({name: each.detach().clone() for name, each in model.state_dict().items()})

    trainer = build(
        tmp_path,
        model=model,
        optimizers=(Moded(model.parameters(), lr=0.1, momentum=0.9), None),
        eval_dataset=build(tmp_path, **FEW).train_dataset,
        eval_strategy="steps",
        eval_steps=1,
        callbacks=[At(2, note)],
        **FEW,
    )
    trainer.train()
    assert names_in(tmp_path) == saves(1, 2, 3)
    found = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(expected[name], each) for name, each in found.items())


# ---- rotation, the best one, and resuming --------------------------------------------------------------------------------


def test_rotation_comes_when_the_new_one_is_durable(native: Any, tmp_path: Path) -> None:
    seen: list[set[str]] = []

    def fail(model: nn.Module) -> None:
        trainer.wait_for_checkpoints()
        seen.append(names_in(tmp_path))
        native.set_fault("fdatasync", error=errno.EIO)

    trainer = build(tmp_path, callbacks=[At(2, fail)], save_total_limit=1, **FEW)
    with pytest.raises(ckpt.CheckpointError, match="checkpoint-3"):
        trainer.train()
    assert seen == [saves(2)] and names_in(tmp_path) == saves(2)  # and not none at all
    clear_faults()
    again = build(tmp_path, save_total_limit=1, **FEW)
    again.train(resume_from_checkpoint=True)
    assert names_in(tmp_path) == saves(3)


def test_a_failed_save_does_not_stop_training_and_many_do(native: Any, caplog: Any, tmp_path: Path) -> None:
    def fail(model: nn.Module) -> None:
        trainer.wait_for_checkpoints()
        native.set_fault("fdatasync", error=errno.EIO)

    few = {**FEW, "max_steps": 6}
    trainer = build(tmp_path / "goes-on", callbacks=[At(1, fail), At(3, lambda model: clear_faults())], **few)
    trainer.train()
    assert {"checkpoint-1", "checkpoint-6"} <= names_in(tmp_path / "goes-on") and "Input/output error" in caplog.text
    how = options(max_failed_saves=2, max_in_flight=1)
    trainer = build(tmp_path / "ends", callbacks=[At(1, fail)], checkpoint_options=how, **few)
    with pytest.raises(FailedSavesError):
        trainer.train()
    clear_faults()
    assert names_in(tmp_path / "ends") == saves(1)


class Metric:
    """Of evaluation: the values of `quality`, one after the other."""

    def __init__(self, *quality: float) -> None:
        self._left = list(quality)

    def __call__(self, prediction: Any) -> dict[str, float]:
        return {"quality": self._left.pop(0)}


def best(tmp_path: Path, *quality: float, **changes: Any) -> Any:
    given = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "quality", "greater_is_better": True, **FEW}
    given |= {"load_best_model_at_end": True, "save_total_limit": 1, **changes}
    trainer = build(tmp_path, eval_dataset=torch.utils.data.Subset(build(tmp_path, **FEW).train_dataset, range(4)), **given)
    trainer.compute_metrics = Metric(*quality)
    return trainer


@pytest.mark.parametrize("winner", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_best_one_stays_and_is_loaded(winner: int, tmp_path: Path) -> None:
    trainer = best(tmp_path, *(float(step == winner) for step in (1, 2, 3)))
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{winner}")
    assert names_in(tmp_path) == saves(winner)
    for name, each in load_file(tmp_path / f"checkpoint-{winner}" / "model.safetensors").items():
        assert torch.equal(trainer.model.state_dict()[name], each)
    said = json.loads((tmp_path / f"checkpoint-{winner}" / "trainer_state.json").read_text())
    assert said["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{winner}")


def test_a_best_one_that_is_lost_is_an_error(native: Any, tmp_path: Path) -> None:
    trainer = best(tmp_path, 0.0, 1.0, 0.0)
    trainer.add_callback(At(1, lambda model: native.set_fault("fdatasync", error=errno.EIO)))
    trainer.add_callback(At(2, lambda model: (trainer._checkpoints.wait_quietly(), clear_faults())))
    with pytest.raises(ckpt.CheckpointError, match=r"the best checkpoint, .*checkpoint-2', is not there"):
        trainer.train()
    assert trainer.state.global_step == 3 and "checkpoint-3" in names_in(tmp_path)


def test_the_best_one_of_a_job_before_stays_until_a_better_one_is_durable(native: Any, tmp_path: Path) -> None:
    best(tmp_path, 1.0, 0.0, 0.0, save_total_limit=2).train()
    trainer = best(tmp_path, 2.0, 0.0, max_steps=5, save_total_limit=2)
    trainer.add_callback(At(3, lambda model: native.set_fault("fdatasync", error=errno.EIO)))
    trainer.add_callback(At(4, lambda model: (trainer._checkpoints.wait_quietly(), clear_faults())))
    with pytest.raises(ckpt.CheckpointError, match=r"the best checkpoint, .*checkpoint-4', is not there"):
        trainer.train(resume_from_checkpoint=True)
    assert names_in(tmp_path) == saves(1, 5)


def test_an_error_of_one_training_is_not_that_of_the_next(native: Any, tmp_path: Path) -> None:
    trainer = best(tmp_path, 1.0, max_steps=1)
    native.set_fault("fdatasync", error=errno.EIO)
    with pytest.raises(ckpt.CheckpointError):
        trainer.train()
    clear_faults()
    trainer.compute_metrics = Metric(1.0)
    trainer.train()
    assert names_in(tmp_path) == saves(1)


def test_resuming_takes_the_newest_good_one(
    lazy: tuple[Path, str], stock: tuple[Path, str], caplog: Any, tmp_path: Path
) -> None:
    shutil.copytree(lazy[0], tmp_path / "saved")
    where = tmp_path / "saved"
    damage(where / f"checkpoint-{STEPS}" / "optimizer.pt")
    (where / f"checkpoint-{STEPS + 1}").mkdir()  # as a Trainer leaves that is killed in the midst of a save
    (where / f"checkpoint-{STEPS + 1}" / "config.json").write_text("{}")
    marked = where / f"checkpoint-{STEPS + 2}"
    shutil.copytree(stock[0] / f"checkpoint-{STEPS}", marked)
    (marked / "checkpoint-is-incomplete.txt").write_text("in progress")
    trainer = build(where)
    trainer.train(resume_from_checkpoint=True)
    assert trainer._initial_global_step == STEPS - 1 and digest(trainer) == stock[1]
    assert f"checkpoint-{STEPS}' is left out" in caplog.text
    with pytest.raises(CorruptError, match="optimizer"):
        damage(where / f"checkpoint-{STEPS}" / "optimizer.pt")
        build(where).train(resume_from_checkpoint=str(where / f"checkpoint-{STEPS}"))
    with pytest.raises(ValueError, match="No valid checkpoint"):
        build(tmp_path / "nothing").train(resume_from_checkpoint=True)


def test_what_the_trainer_has_saved_again_is_resumed_from(lazy: tuple[Path, str], caplog: Any, tmp_path: Path) -> None:
    where = tmp_path / "saved"
    shutil.copytree(lazy[0], where)
    shutil.rmtree(where / f"checkpoint-{STEPS - 1}")
    build(where, Trainer, max_steps=STEPS).train(resume_from_checkpoint=None)
    assert (where / f"checkpoint-{STEPS}" / "manifest.json").exists()
    trainer = build(where, max_steps=STEPS + 1)
    trainer.train(resume_from_checkpoint=True)
    assert trainer._initial_global_step == STEPS and "is not verified" in caplog.text
