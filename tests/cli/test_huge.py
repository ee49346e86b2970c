"""A hundred thousand tensors: each command that looks into files answers, and says as little as for ten."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from command_line import Shell
from safetensors.torch import save_file
from support import options

import ckpt

pytestmark = pytest.mark.slow
MANY = 100_000


def tensors(value: float = 0.0) -> dict[str, torch.Tensor]:
    whole = torch.full((MANY, 4), value)
    return {f"layers.{number}.weight": whole[number].clone() for number in range(MANY)}


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("huge")
    with ckpt.Checkpointer(directory / "run", options=options()) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, tensors(float(step))).result()
    save_file(tensors(), directory / "a.safetensors")
    torch.save(tensors(), directory / "torch.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(tensors(), checkpoint_id=directory / "dcp", no_dist=True)
    return directory


PLACES = ("run", "a.safetensors", "torch.pt", "dcp")


@pytest.mark.parametrize("place", PLACES)
def test_shown(place: str, huge: Path, shell: Shell) -> None:
    said = shell("show", huge / place, "--tensors", "layers.99999.*")
    assert said.code == 0 and "layers.99999.weight" in said.out and len(said.out.splitlines()) < 20
    assert len(shell("show", huge / place).out.splitlines()) < 60
    assert len(shell("show", huge / place, "--tree").out.splitlines()) > 2 * MANY


@pytest.mark.parametrize("place", PLACES)
def test_verified(place: str, huge: Path, shell: Shell) -> None:
    assert shell("verify", huge / place).code == 0


@pytest.mark.parametrize("place", PLACES[1:])
def test_compared(place: str, huge: Path, shell: Shell) -> None:
    document = shell.json("diff", huge / "run", huge / place)
    assert document["same"] and document["alike"] == MANY


def test_compared_by_values(huge: Path, shell: Shell) -> None:
    document = shell.json("diff", f"{huge / 'run'}:1", huge / "a.safetensors", "--values", code=1)
    assert len(document["distances"]) == MANY and {each["largest"] for each in document["distances"]} == {1.0}


@pytest.mark.parametrize("form", ["safetensors", "pt", "dcp"])
def test_exported(form: str, huge: Path, shell: Shell, tmp_path: Path) -> None:
    assert shell.json("export", huge / "run", "-o", tmp_path / "out", "--format", form)["tensors"] == MANY
    assert shell("diff", huge / "run", tmp_path / "out").code == 0
