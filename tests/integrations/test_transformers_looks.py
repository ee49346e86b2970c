"""Who looks at a checkpoint of the Trainer as soon as it is saved finds it; and Trainers of one's own, and of others."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from support import DEADLINE_S, clear_faults
from torch import nn

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

from dist.trainer_training import build
from trainer_saves import FEW, At, names_in, saves
from transformers import Trainer, TrainerCallback

import ckpt
from ckpt.errors import UnsupportedError
from ckpt.integrations.transformers import LazyCheckpointMixin, LazyTrainer


class Visitor(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[bool] = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        place = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.seen.append((place / "trainer_state.json").exists())
        if self.seen[-1]:
            (place / "mine.txt").write_text("kept")


@pytest.mark.parametrize("reads", [True, False])
def test_callbacks_meet_whole_checkpoints(reads: bool, native: Any, tmp_path: Path) -> None:
    visitor = Visitor()
    visitor.reads_checkpoints = reads
    trainer = build(tmp_path, callbacks=[visitor, At(1, lambda model: clear_faults())], **FEW)
    if not reads:
        native.set_fault("fdatasync", delay_s=DEADLINE_S)
    trainer.train()
    assert visitor.seen[0] is reads
    assert (tmp_path / "checkpoint-1" / "mine.txt").exists() is reads


def test_a_checkpoint_at_a_signal_is_waited_for(tmp_path: Path) -> None:
    trainer = build(tmp_path, enable_jit_checkpoint=True, save_strategy="no", **FEW)
    jit = next(each for each in trainer.callback_handler.callbacks if hasattr(each, "jit_manager"))
    seen: list[set[str]] = []
    real = jit.jit_manager.execute_jit_checkpoint

    def execute() -> None:
        real()
        seen.append(names_in(tmp_path / "checkpoint-1"))  # ahead of the optimizer's second step

    jit.jit_manager.execute_jit_checkpoint = execute
    trainer.add_callback(At(1, lambda model: setattr(jit.jit_manager, "is_checkpoint_requested", True)))
    trainer.train()
    assert len(seen) == 1 and {"model.safetensors", "optimizer.pt", "trainer_state.json"} <= seen[0]
    assert not any("incomplete" in name for name in seen[0]) and trainer.state.global_step == 2


def test_what_is_uploaded_is_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pushed: list[set[str]] = []
    trainer = build(tmp_path, save_total_limit=2, **FEW)
    monkeypatch.setattr(type(trainer), "_push_from_checkpoint", lambda self, folder: pushed.append(names_in(Path(folder))))
    trainer.args.push_to_hub = True
    trainer.train()
    assert len(pushed) == 3 and all({"model.safetensors", "manifest.json"} <= each for each in pushed)
    assert names_in(tmp_path) == saves(2, 3)


def test_uploads_hold_nothing_that_is_being_put_together(monkeypatch: pytest.MonkeyPatch, native: Any, tmp_path: Path) -> None:
    import transformers.trainer
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects

    uploaded: list[str] = []

    def upload_folder(self: Any, *, folder_path: str, ignore_patterns: Any, **_: Any) -> None:
        there = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
        assert any(".partial/" in path for path in there)
        uploaded.extend(filter_repo_objects(there, ignore_patterns=ignore_patterns))

    def push(model: nn.Module) -> None:
        monkeypatch.setattr(trainer._checkpoints, "wait_quietly", lambda: None)
        trainer.push_to_hub()
        monkeypatch.undo()
        clear_faults()

    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(transformers.trainer.Trainer, "create_model_card", lambda self, **_: None)
    trainer = build(tmp_path, callbacks=[At(1, push)], **FEW)
    trainer.hub_model_id = "somebody/something"
    native.set_fault("fdatasync", delay_s=DEADLINE_S)
    trainer.train()
    assert "model.safetensors" in uploaded and not any(path.startswith((".", "checkpoint")) for path in uploaded)


class Adds(LazyTrainer):
    """Writes beside the model, and to the checkpoint when that should be there."""

    def save_model(self, output_dir: Any = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        (Path(output_dir) / "beside.txt").write_text("here")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        place = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        (place / "behind.txt").write_text(str(len(list(place.iterdir()))))


class WritesThere(Trainer):
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        place = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        place.mkdir(exist_ok=True)
        (place / "lost.txt").write_text("never")


class Mixed(LazyCheckpointMixin, WritesThere):
    pass


def test_trainers_of_ones_own(tmp_path: Path) -> None:
    build(tmp_path / "adds", Adds, **FEW).train()
    assert {"beside.txt", "behind.txt"} <= names_in(tmp_path / "adds" / "checkpoint-3")
    with pytest.raises(ckpt.CheckpointError, match=r"lost\.txt was written to .*checkpoint-3'"):
        build(tmp_path / "mixed", Mixed, **FEW).train()


def test_a_model_saved_by_the_user_is_there_and_so_are_all_checkpoints(native: Any, tmp_path: Path) -> None:
    def save(model: nn.Module) -> None:
        native.set_fault("fdatasync", delay_s=0.01)
        trainer.save_model(str(tmp_path / "own"))
        clear_faults()
        assert names_in(tmp_path) == {"own", *saves(1, 2)}
        assert {"model.safetensors", "config.json", "training_args.bin"} <= names_in(tmp_path / "own")

    trainer = build(tmp_path, callbacks=[At(2, save)], **FEW)
    trainer.train()
    assert names_in(tmp_path) == {"own", *saves(1, 2, 3)}


def test_other_trainers_are_left_alone(tmp_path: Path) -> None:
    """In a process that has lazy ones, too."""
    trainer = build(tmp_path, Trainer, save_total_limit=2, **FEW)
    trainer.train()
    assert names_in(tmp_path) == saves(2, 3) and "manifest.json" not in names_in(tmp_path / "checkpoint-3")


def test_only_the_model(tmp_path: Path) -> None:
    build(tmp_path, save_only_model=True, save_on_each_node=True, **FEW).train()
    assert "model.safetensors" in names_in(tmp_path / "checkpoint-3")
    assert not {"optimizer.pt", "rng_state.pth"} & names_in(tmp_path / "checkpoint-3")


def test_a_trainer_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match=r"NoTrainer cannot checkpoint lazily: _save_checkpoint\(\), .*5\.24\.0"):
        type("NoTrainer", (LazyCheckpointMixin,), {})
    monkeypatch.delattr("transformers.trainer.rotate_checkpoints")
    with pytest.raises(UnsupportedError, match=r"Later cannot checkpoint lazily: transformers\.trainer\.rotate_checkpoints"):
        type("Later", (LazyCheckpointMixin, Trainer), {})
