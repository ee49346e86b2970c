"""Trainers and callbacks of one's own: what they write to a checkpoint, how they call the writers, what they are told."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from choice import in_turn, mostly_slow
from support import clear_faults

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

from dist.trainer_training import arguments, build, network
from safetensors.torch import load_file, save_file
from trainer_saves import FEW, At, names_in, saves
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback

import ckpt
from ckpt.integrations.transformers import LazyCheckpointMixin, LazyTrainer

ONCE = {"max_steps": 1, "gradient_accumulation_steps": 1}


class WritesAgain(LazyTrainer):
    def save_model(self, output_dir: Any = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        save_file({"merged": torch.ones(3)}, Path(output_dir) / "model.safetensors")


class WritesAgainUnseen(WritesAgain):
    reads_checkpoints = False


def test_a_file_that_an_override_writes_again_is_not_lost_silently(tmp_path: Path) -> None:
    build(tmp_path / "seen", WritesAgain, **ONCE).train()
    assert load_file(tmp_path / "seen" / "checkpoint-1" / "model.safetensors").keys() == {"merged"}
    with pytest.raises(ckpt.CheckpointError, match=r"'model\.safetensors' was written twice"):
        build(tmp_path, WritesAgainUnseen, **ONCE).train()
    assert "checkpoint-1" not in names_in(tmp_path)


class RemovesModel(Trainer):
    def save_model(self, output_dir: Any = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        Path(output_dir, "model.safetensors").unlink(missing_ok=True)


class RemovesArguments(Trainer):
    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if os.path.isfile(path := os.path.join(output_dir, "training_args.bin")):
            os.remove(path)


class RenamesModel(Trainer):
    def _save(self, *args: Any, **kwargs: Any) -> None:
        super()._save(*args, **kwargs)
        for path in Path(args[0]).glob("*.safetensors"):
            path.rename(path.with_name("renamed.safetensors"))


class RemovesOptimizer(Trainer):
    def _save_optimizer_and_scheduler(self, output_dir: Any) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        for path in Path(output_dir).glob("optimizer*"):
            path.unlink()


class RemovesRandomNumbers(Trainer):
    def _save_rng_state(self, output_dir: Any) -> None:
        super()._save_rng_state(output_dir)
        if (path := Path(output_dir) / "rng_state.pth").exists():
            path.unlink()


class Slim(GPT2LMHeadModel):
    """A model that saves itself otherwise."""

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        Path(save_directory, "model.safetensors").unlink(missing_ok=True)


OWN = [RemovesModel, RemovesArguments, RenamesModel, RemovesOptimizer, RemovesRandomNumbers, Slim]


@pytest.mark.parametrize(("own", "behind"), mostly_slow([(own, side) for own in OWN for side in (0, 1)], run=in_turn(OWN)))
def test_what_an_override_does_with_files_of_the_trainer_holds(own: Any, behind: int, tmp_path: Path) -> None:
    """Whether it comes before the mixin or behind it: the names are those that are left with the Trainer alone."""
    model = Slim(network().config) if own is Slim else None
    kind = Trainer if own is Slim else own
    bases = (LazyCheckpointMixin, kind) if behind else (kind, LazyTrainer) if own is not Slim else (LazyTrainer,)
    build(tmp_path / "stock", kind, model=model, **ONCE).train()
    build(tmp_path / "lazy", type("Lazy", bases, {}), model=model, **ONCE).train()
    left = names_in(tmp_path / "stock" / "checkpoint-1")
    assert names_in(tmp_path / "lazy" / "checkpoint-1") == left | {"manifest.json"}
    listed = json.loads((tmp_path / "lazy" / "checkpoint-1" / "manifest.json").read_text())["files"]
    assert listed and {each["name"] for each in listed} <= left


class LeavesAlone(LazyTrainer):
    """Adds to the checkpoint, and says that this is all it does."""

    reads_checkpoints = False

    def save_model(self, output_dir: Any = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        Path(output_dir, "beside.txt").write_text("here")


def test_what_no_override_can_see_still_leaves_in_the_background(tmp_path: Path) -> None:
    def listed(kind: type[Trainer], **how: Any) -> set[str]:
        place = tmp_path / kind.__name__
        build(place, kind, **ONCE, **how).train()
        return {each["name"] for each in json.loads((place / "checkpoint-1" / "manifest.json").read_text())["files"]}

    all_files = {"model.safetensors", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert listed(LazyTrainer) >= all_files
    assert listed(LeavesAlone) >= all_files
    looks = listed(type("Looks", (RemovesRandomNumbers, LazyTrainer), {}))
    assert all_files - looks == {"rng_state.pth"}


class LeavesAFile(LazyTrainer):
    def save_model(self, output_dir: Any = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        Path(self.args.output_dir, "checkpoint-1").write_text("mine")


def test_what_cannot_be_listed_fails_the_save_and_not_the_training(tmp_path: Path) -> None:
    trainer = build(tmp_path, LeavesAFile, **ONCE)
    with pytest.raises(ckpt.CheckpointError, match="checkpoint-1', where a checkpoint is to be, cannot be listed: Not a dir"):
        trainer.train()
    assert trainer.state.global_step == 1 and (tmp_path / "checkpoint-1").read_text() == "mine"


class WritesBefore(LazyTrainer):
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        place = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        (place / "more").mkdir(parents=True)
        for name in ("projector.bin", "more/scores.json", "model.safetensors"):
            (place / name).write_text("mine")
        super()._save_checkpoint(model, trial)


def test_what_lies_there_before_the_first_save_becomes_part_of_it(tmp_path: Path) -> None:
    build(tmp_path, WritesBefore, **ONCE).train()
    place = tmp_path / "checkpoint-1"
    assert [(place / name).read_text() for name in ("projector.bin", "more/scores.json")] == ["mine", "mine"]
    assert load_file(place / "model.safetensors")  # as the Trainer would have written over it


class CallsByKeyword(Trainer):
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        place = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        self.save_model(_internal_call=True, output_dir=place)
        self._save_optimizer_and_scheduler(output_dir=place)
        self._save_rng_state(output_dir=place)
        self.state.save_to_json(json_path=os.path.join(place, "trainer_state.json"))


class LazyByKeyword(LazyCheckpointMixin, CallsByKeyword):
    pass


def test_writers_may_be_called_by_keyword(tmp_path: Path) -> None:
    LazyByKeyword(model=network(), args=arguments(tmp_path, **ONCE), train_dataset=build(tmp_path).train_dataset).train()
    expected = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "manifest.json"}
    assert expected <= names_in(tmp_path / "checkpoint-1")


class Listener(TrainerCallback):
    reads_checkpoints = False

    def __init__(self) -> None:
        self.told: list[int] = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.told.append(state.global_step)


def test_callbacks_that_read_are_told_of_checkpoints_that_are_there(native: Any, caplog: Any, tmp_path: Path) -> None:
    """Also one whose on_save() is its own, and not that of a class."""
    found: list[tuple[int, bool]] = []

    def write(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        place = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        found.append((state.global_step, place.exists()))
        place.mkdir(exist_ok=True)
        (place / "adapter.bin").write_text("mine")

    reader, listener = TrainerCallback(), Listener()
    reader.on_save = write
    faults = At(1, lambda model: native.set_fault("fdatasync", error=errno.EIO)), At(2, lambda model: clear_faults())
    native.set_fault("fdatasync", delay_s=0.02)
    build(tmp_path, callbacks=[reader, listener, *faults], **FEW).train()
    assert found == [(1, True), (3, True)] and listener.told == [1, 2, 3]
    assert names_in(tmp_path) == saves(1, 3) and "on_save() of TrainerCallback is not called" in caplog.text


class Lomo(torch.optim.Optimizer):
    """As that of lomo_optim: it updates the parameters in the backward pass."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-3})
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(self._update)

    @torch.no_grad()
    def _update(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        parameter.add_(parameter.grad, alpha=-1e-3)
        parameter.grad = None

    def step(self, closure: Any = None) -> None:
        pass


def test_optimizers_that_update_in_the_backward_pass(native: Any, tmp_path: Path) -> None:
    model = network(n_embd=128)
    native.set_fault("fallocate", delay_s=0.05)
    build(tmp_path, model=model, max_grad_norm=0, optimizers=(Lomo(model.parameters()), None), **FEW).train()
    assert names_in(tmp_path) == saves(1, 2, 3)
