"""Which rivals there are, and which of them run here.

Each stands in the best configuration that its documentation names and that runs on a CPU; `configuration` says which.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.rivals.base import KEEP, Rival, flat, names_of
from bench.rivals.libraries import Safetensors, TorchCheckpointing, Torchsnapshot
from bench.rivals.ours import Ckpt
from bench.rivals.torch_save import TorchSave, TorchSaveWithoutCrc

PACKAGES = ("safetensors", "torch_checkpointing", "torchsnapshot")


def all_rivals() -> dict[str, type[Rival]]:
    from bench.rivals.dcp import DcpAsyncProcess, DcpAsyncStaging, DcpAsyncThread, DcpSave

    dcp: list[type[Rival]] = [DcpSave, DcpAsyncThread, DcpAsyncStaging, DcpAsyncProcess]
    found = [Ckpt, TorchSave, TorchSaveWithoutCrc, Safetensors, *dcp, Torchsnapshot, TorchCheckpointing]
    return {rival.name: rival for rival in found}


OURS, TORCH, DCP_THREAD = Ckpt.name, TorchSave.name, "DCP async_save, thread"
FEW = (OURS, TORCH, DCP_THREAD)


def chosen(parts: Sequence[str], default: Sequence[str] = ()) -> list[str]:
    """Ours, and the rivals in whose names one of the parts stands; without parts, the default, or all.

    Raises:
        ValueError: a part stands in no name.
    """
    names = list(all_rivals())
    for part in parts:
        if not any(part in name for name in names):
            raise ValueError(f"no engine has '{part}' in its name; there are: {'; '.join(names)}")
    if not parts:
        return [name for name in names if name in default] if default else names
    return [name for name in names if name == OURS or any(part in name for part in parts)]


@dataclasses.dataclass
class Field:
    """The rivals that run here, opened; and why the others do not."""

    rivals: dict[str, Rival]
    errors: dict[str, str]

    def close(self) -> None:
        for rival in self.rivals.values():
            rival.close()

    def drop(self, name: str, error: Exception) -> None:
        """From now on it is one of those that do not run."""
        self.errors[name] = said(error)
        self.rivals.pop(name, None)


def said(error: BaseException) -> str:
    """An error's type and first lines, of those that carry the trace of another process."""
    return f"{type(error).__name__}: {error}"[:600]


def start(names: Sequence[str], directory: Path, lazy: bool | None = None, keep: int = KEEP) -> Field:
    """Opens rivals, each in a directory of its own."""
    field, classes = Field({}, {}), all_rivals()
    for number, name in enumerate(names):
        place = directory / f"rival{number}"
        rival = Ckpt(place, keep, lazy) if name == OURS else classes[name](place, keep)
        try:
            rival.open()
            field.rivals[name] = rival
        except Exception as error:  # a rival that does not run is a result
            if rival.ours:
                raise
            field.drop(name, error)
    return field


def try_out(field: Field, state: dict[str, Any], into: dict[str, Any]) -> None:
    """Each saves once and loads it; one whose tensors do not come back as they were is not measured.

    Raises:
        Exception: it is ours.
    """
    for name, rival in list(field.rivals.items()):
        try:
            check(rival, state, into)
        except Exception as error:
            if rival.ours:
                raise
            field.drop(name, error)


def check(rival: Rival, state: dict[str, Any], into: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: a tensor came back changed.
    """
    with torch.no_grad():
        for tensor in flat(into).values():
            tensor.zero_()
    rival.save(state)
    rival.before_step()
    rival.finish()
    rival.synchronise()
    rival.load(into)
    found = flat(into)
    for name, tensor in names_of(state):
        if not torch.equal(found[name], tensor):
            raise ValueError(f"tensor {name} came back changed")


def versions() -> dict[str, str]:
    """Of the packages of rivals that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
