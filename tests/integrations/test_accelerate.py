"""save_state() and load_state() of accelerate, by one process: files, names, what is captured when, and what goes wrong."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("accelerate") is None:
    pytest.skip("accelerate is not installed", allow_module_level=True)

from accelerate_saves import Training, damage
from accelerate_saves import enabled as enabled
from safetensors.torch import load_file
from support import DEADLINE_S, assert_same, clear_faults, options
from torch import nn

import ckpt
import ckpt.integrations.accelerate as lazy
from ckpt.errors import CaptureError, CorruptError, FailedSavesError, UnsupportedError

LATE_S = 0.3  # writers are held up for so long


def contents(directory: Path) -> dict[str, Any]:
    """Of all files that accelerate would write."""
    found = {}
    for path in sorted(directory.iterdir()):
        if path.suffix == ".safetensors":
            found[path.name] = dict(sorted(load_file(path).items()))
        elif path.name not in ("manifest.json", ".lock"):
            found[path.name] = torch.load(path, weights_only=False)
    return found


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))


def hold(native: Any) -> None:
    """Nothing becomes durable until clear_faults()."""
    native.set_fault("fdatasync", delay_s=DEADLINE_S)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [True, False])
def test_the_files_are_those_of_accelerate(safe: bool, tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.save_as_accelerate(tmp_path / "stock", safe_serialization=safe)
    assert training.save(tmp_path / "ours", safe_serialization=safe) == tmp_path / "ours"
    lazy.wait(DEADLINE_S)
    assert_same(contents(tmp_path / "stock"), contents(tmp_path / "ours"))


def test_each_loads_what_the_other_has_saved(tmp_path: Path) -> None:
    training = Training(tmp_path)
    expected = training.everything()
    training.save(tmp_path / "ours")
    training.save_as_accelerate(tmp_path / "stock")
    for path, by_accelerate in ((tmp_path / "ours", True), (tmp_path / "stock", False), (tmp_path / "ours", False)):
        training.advance()
        if by_accelerate:
            lazy.disable()
        training.accelerator.load_state(str(path))
        lazy.enable(options())
        assert_same(expected, training.everything())


@pytest.mark.parametrize("safe", [True, False])
def test_what_learns_is_not_copied(safe: bool, tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.save(tmp_path / "state", safe_serialization=safe)
    assert lazy._saves is not None
    stats = lazy._saves._newest[tmp_path / "state"].stats
    lazy.wait(DEADLINE_S)
    learning = sum(parameter.nbytes for parameter in training.bare.parameters() if parameter.dim() == 2)
    average = sum(tensor.nbytes for tensor in training.average.shadow)
    assert stats.bytes_total > 3 * learning + average  # with both moments
    assert stats.bytes_copied_in_save < learning / 2 + average


def test_hooks_write_to_the_state(tmp_path: Path) -> None:
    training = Training(tmp_path)

    def save_elsewhere(models: list[nn.Module], weights: list[Any], output_dir: str) -> None:
        folder = Path(output_dir, "unet")
        folder.mkdir()
        torch.save(models[0].state_dict(), folder / "weights.bin")
        training.accelerator.save({"note": 1}, str(folder / "note.bin"))
        weights.pop()

    training.accelerator.register_save_state_pre_hook(save_elsewhere)
    training.save(tmp_path / "state")
    lazy.wait(DEADLINE_S)
    assert names(tmp_path / "state" / "unet") == ["note.bin", "weights.bin"]
    assert not (tmp_path / "state" / "model.safetensors").exists()
    assert torch.load(tmp_path / "state" / "unet" / "note.bin") == {"note": 1}


def test_other_files_are_there_on_return(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.accelerator.save({"a": torch.ones(3)}, str(tmp_path / "a.bin"))
    training.accelerator.save_model(training.model, str(tmp_path / "export"))
    assert torch.load(tmp_path / "a.bin")["a"].sum() == 3
    assert_same(dict(sorted(training.bare.state_dict().items())), contents(tmp_path / "export")["model.safetensors"])


# ---- what is captured when -------------------------------------------------------------------------------------------


def test_what_is_written_afterwards_is_not_saved(tmp_path: Path, native: Any) -> None:
    """By a forward, a step, the average, a schedule, random numbers: with nothing written yet when save_state() returns."""
    training = Training(tmp_path)
    native.set_fault("fallocate", delay_s=LATE_S)
    expected = training.everything()
    training.save(tmp_path / "state")
    training.average.update(training.bare)
    training.backward()  # accumulates: the statistics move, no step
    training.backward()  # steps, and waits until all that it writes is safe
    clear_faults()
    lazy.wait(DEADLINE_S)
    training.accelerator.load_state(str(tmp_path / "state"))
    assert_same(expected, training.everything())


def test_a_step_that_a_scaler_skips_and_one_that_it_takes(tmp_path: Path, native: Any) -> None:
    training = Training(tmp_path, torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1))
    scaler = training.accelerator.scaler
    native.set_fault("fallocate", delay_s=LATE_S)
    expected, scale = training.everything(), scaler.get_scale()
    training.save(tmp_path / "state")
    training.backward()
    next(training.bare.parameters()).grad.fill_(torch.inf)
    training.backward()
    assert training.optimizer.step_was_skipped and scaler.get_scale() < scale
    training.advance()
    assert not training.optimizer.step_was_skipped
    clear_faults()
    lazy.wait(DEADLINE_S)
    training.accelerator.load_state(str(tmp_path / "state"))
    assert_same(expected, training.everything())
    assert scaler.get_scale() == scale


def test_a_write_that_no_fence_has_announced_fails_the_save(tmp_path: Path, native: Any) -> None:
    training = Training(tmp_path)
    training.save(tmp_path / "state")
    lazy.wait(DEADLINE_S)
    before = contents(tmp_path / "state")
    native.set_fault("fallocate", delay_s=LATE_S)
    training.save(tmp_path / "state")
    with torch.no_grad():
        training.bare[0].weight.mul_(2)  # as averaged weights are swapped in
    clear_faults()
    with pytest.raises(CaptureError, match=r"0\.weight"):
        lazy.wait(DEADLINE_S)
    assert_same(before, contents(tmp_path / "state"))
    training.save(tmp_path / "state")
    ckpt.fence()
    with torch.no_grad():
        training.bare[0].weight.mul_(2)
    lazy.wait(DEADLINE_S)


# ---- names -----------------------------------------------------------------------------------------------------------


def test_a_state_has_its_name_when_it_is_durable(tmp_path: Path, native: Any) -> None:
    training = Training(tmp_path, automatic_checkpoint_naming=True)
    folder = tmp_path / "checkpoints"
    training.save()
    lazy.wait(DEADLINE_S)
    hold(native)
    assert training.save() == folder / "checkpoint_1"
    assert os.listdir(folder) == ["checkpoint_0"]
    training.accelerator.project_configuration.iteration = 1
    with pytest.raises(ValueError, match="already exists"):
        training.save()
    clear_faults()
    lazy.wait(DEADLINE_S)
    assert names(folder) == ["checkpoint_0", "checkpoint_1"]
    with pytest.raises(ValueError, match="already exists"):
        training.save()


def test_a_load_takes_the_newest_and_waits_for_it(tmp_path: Path) -> None:
    training = Training(tmp_path, automatic_checkpoint_naming=True)
    for _ in range(3):
        training.advance()
        expected = training.everything()
        training.save()
    training.advance()
    training.accelerator.load_state()
    assert_same(expected, training.everything())


def test_a_number_below_others_is_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Accelerate counts from 0 after a load."""
    training = Training(tmp_path, automatic_checkpoint_naming=True, total_limit=1)
    for _ in range(3):
        training.save()
    lazy.wait(DEADLINE_S)
    training.accelerator.load_state()
    assert caplog.messages == []
    training.accelerator.project_configuration.iteration = 0
    for _ in range(2):
        training.save()
        lazy.wait(DEADLINE_S)
        (tmp_path / "checkpoints" / "checkpoint_2").mkdir(exist_ok=True)
    (said,) = [message for message in caplog.messages if "iteration = 3 behind load_state()" in message]
    assert "checkpoint_0' is saved where there is number 2" in said


def test_old_ones_go_when_the_newest_is_durable(tmp_path: Path, native: Any) -> None:
    training = Training(tmp_path, automatic_checkpoint_naming=True, total_limit=2)
    folder = tmp_path / "checkpoints"
    (folder / "notes").mkdir(parents=True)
    for _ in range(3):
        training.save()
        lazy.wait(DEADLINE_S)
    assert names(folder) == ["checkpoint_1", "checkpoint_2", "notes"]
    hold(native)
    training.save()
    assert names(folder) == ["checkpoint_1", "checkpoint_2", "notes"]
    clear_faults()
    lazy.wait(DEADLINE_S)
    native.set_fault("fdatasync", "checkpoint_4", error=5)
    training.save()
    with pytest.raises(ckpt.CheckpointError):
        lazy.wait(DEADLINE_S)
    assert names(folder) == ["checkpoint_2", "checkpoint_3", "notes"]


@pytest.mark.parametrize("mixed", [True, False])
def test_what_else_lies_in_a_directory_stays(mixed: bool, tmp_path: Path) -> None:
    training, directory = Training(tmp_path), tmp_path / "state"
    training.save_as_accelerate(directory)
    (directory / "custom_checkpoint_7.pkl").touch()  # of another state, which had more
    if mixed:
        (directory / "log.txt").write_text("mine")
        (directory / "newest").symlink_to("nowhere")
    training.advance()
    training.save(directory)
    lazy.wait(DEADLINE_S)
    assert (directory / "custom_checkpoint_7.pkl").exists() == mixed
    if mixed:
        assert (directory / "log.txt").read_text() == "mine"
        (directory / "custom_checkpoint_7.pkl").unlink()
    expected = training.everything()
    training.advance()
    training.accelerator.load_state(str(directory))
    assert_same(expected, training.everything())


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_failures_do_not_stop_the_training_at_once(tmp_path: Path, native: Any, caplog: pytest.LogCaptureFixture) -> None:
    training = Training(tmp_path)
    native.set_fault("fdatasync", "", error=28)
    for number in range(2):
        training.save(tmp_path / f"state_{number}")
        with pytest.raises(ckpt.CheckpointError, match="No space left"):
            lazy.wait(DEADLINE_S)
    assert "No space left" in caplog.text
    with pytest.raises(FailedSavesError):
        training.save(tmp_path / "state_2")
    assert names(tmp_path) == []
    clear_faults()
    training.save(tmp_path / "state_3")
    training.accelerator.end_training()
    assert names(tmp_path) == ["state_3"]


def test_the_end_of_training_waits_and_tells(tmp_path: Path, native: Any) -> None:
    training = Training(tmp_path)
    native.set_fault("fdatasync", "", error=5)
    training.save(tmp_path / "state")
    with pytest.raises(ckpt.CheckpointError):
        training.accelerator.end_training()
    assert names(tmp_path) == []


def test_an_error_in_a_hook_comes_out_and_nothing_is_left(tmp_path: Path) -> None:
    training = Training(tmp_path)

    def fail(*_: Any) -> None:
        raise KeyError("mine")

    handle = training.accelerator.register_save_state_pre_hook(fail)
    with pytest.raises(KeyError, match="mine"):
        training.save(tmp_path / "state")
    with pytest.raises(ckpt.CheckpointError, match="has raised KeyError: 'mine'"):
        lazy.wait(DEADLINE_S)
    handle.remove()
    training.save(tmp_path / "state")
    lazy.wait(DEADLINE_S)
    assert names(tmp_path) == ["state"] and not list(tmp_path.glob(".lazyckpt-*"))


def test_damage_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    training = Training(tmp_path, automatic_checkpoint_naming=True)
    training.save()
    expected = training.everything()
    training.advance()
    newest = training.save()
    lazy.wait(DEADLINE_S)
    damage(newest / "optimizer.bin")
    with pytest.raises(CorruptError, match=r"optimizer\.bin"):
        training.accelerator.load_state(str(newest))
    training.accelerator.load_state()
    assert_same(expected, training.everything())
    assert "'checkpoint_1' is not a good checkpoint" in caplog.text


@pytest.mark.parametrize("ask", [lambda a, p: a.load_state(str(p / "none")), lambda a, p: a.load_state()])
def test_what_is_not_there_is_told_by_accelerate(ask: Callable[[Any, Path], Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not exist|automatic checkpoint naming is disabled"):
        ask(Training(tmp_path).accelerator, tmp_path)


def test_what_this_does_not_do_is_left_to_accelerate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    training = Training(tmp_path, save_on_each_node=True)
    with caplog.at_level(logging.WARNING):
        training.save(tmp_path / "state")
    assert (tmp_path / "state" / "optimizer.bin").exists() and "save_on_each_node" in caplog.text


def test_an_unknown_accelerate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from ckpt.integrations.accelerate import accelerate_private as private

    monkeypatch.delattr("accelerate.utils.other.safe_save_file")
    with pytest.raises(UnsupportedError, match=r"accelerate\.utils\.other:safe_save_file.*1\.15\.0"):
        private.check()
    with pytest.raises(ValueError, match="'all' or 'main'"):
        lazy.enable(ranks="one")
