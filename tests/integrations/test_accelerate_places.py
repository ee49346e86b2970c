"""Where accelerate's states are saved: other file systems, what hooks and others put there, and what was saved over another."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from support import DEADLINE_S, assert_same, clear_faults
from torch import nn

if importlib.util.find_spec("accelerate") is None:
    pytest.skip("accelerate is not installed", allow_module_level=True)

from accelerate_saves import Training, damage
from accelerate_saves import enabled as enabled

import ckpt
import ckpt.integrations.accelerate as lazy
from ckpt.errors import CorruptError


def test_what_hooks_have_written_goes_with_its_state(tmp_path: Path, native: Any, caplog: pytest.LogCaptureFixture) -> None:
    training, directory = Training(tmp_path), tmp_path / "state"

    def save_weights(models: list[nn.Module], weights: list[Any], output_dir: str) -> None:
        folder = Path(output_dir, "unet")
        folder.mkdir(exist_ok=True)
        torch.save(models[0].state_dict(), folder / "weights.bin")
        weights.clear()

    def load_weights(models: list[nn.Module], input_dir: str) -> None:
        models.pop().load_state_dict(torch.load(Path(input_dir, "unet", "weights.bin")))

    training.accelerator.register_save_state_pre_hook(save_weights)
    training.accelerator.register_load_state_pre_hook(load_weights)
    for _ in range(2):  # the second takes the place of the first
        training.advance()
        training.save(directory)
        lazy.wait(DEADLINE_S)
    expected = training.everything()
    training.advance()
    native.set_fault("fdatasync", error=28)
    training.save(directory)
    with pytest.raises(ckpt.CheckpointError, match="No space left"):
        lazy.wait(DEADLINE_S)
    clear_faults()
    training.accelerator.load_state(str(directory))
    assert_same(expected, training.everything())
    assert "beside a state" not in caplog.text
    (directory / "unet" / "notes.txt").write_text("mine")
    training.save(directory)
    lazy.wait(DEADLINE_S)
    assert (directory / "unet" / "notes.txt").read_text() == "mine"
    assert "holds unet/notes.txt beside a state" in caplog.text


def test_a_folder_on_another_file_system(tmp_path: Path) -> None:
    """Where no directory can be renamed to."""
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one file system only")
    training = Training(tmp_path, automatic_checkpoint_naming=True)
    with tempfile.TemporaryDirectory(dir=elsewhere) as folder:
        (tmp_path / "checkpoints").symlink_to(folder)
        for _ in range(2):
            training.advance()
            expected = training.everything()
            training.save()
            lazy.wait(DEADLINE_S)
        training.advance()
        training.accelerator.load_state()
        assert_same(expected, training.everything())
        assert sorted(os.listdir(folder)) == ["checkpoint_0", "checkpoint_1"]
        assert (Path(folder) / "checkpoint_1" / "manifest.json").exists()


def test_a_state_that_accelerate_has_saved_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    training, directory = Training(tmp_path), tmp_path / "state"
    training.save(directory)
    lazy.wait(DEADLINE_S)
    training.advance()
    expected = training.everything()
    training.save_as_accelerate(directory)
    training.advance()
    training.accelerator.load_state(str(directory))
    assert_same(expected, training.everything())
    assert "is not verified" in caplog.text


def test_a_damaged_copy_is_not_taken_for_one(tmp_path: Path) -> None:
    training, directory = Training(tmp_path), tmp_path / "state"
    training.save(directory)
    lazy.wait(DEADLINE_S)
    for path in directory.iterdir():
        damage(path) if path.name == "optimizer.bin" else path.touch()
    os.utime(directory / "manifest.json", (0, 0))
    with pytest.raises(CorruptError, match=r"optimizer\.bin.*remove the manifest\.json"):
        training.accelerator.load_state(str(directory))
