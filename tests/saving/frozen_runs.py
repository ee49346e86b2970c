"""Runs of which a part is frozen, in a file of its own, and what became of their files."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import DEADLINE_S, assert_same, options

import ckpt
from ckpt.saving import frozen_file

MIB = 1 << 20
FROZEN = 4 * MIB


@pytest.fixture(autouse=True)
def small_files_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_file, "LEAST_BYTES", 2 * MIB)


class Run:
    """Saves and checks. Two tensors of 1 MiB and one of 2 MiB are frozen; what learns changes with every step."""

    def __init__(self, directory: Path, *, kind: str = "state", keep: int | None = None, **changes: Any) -> None:
        self.directory, self.kind = directory / "run", kind
        self.checkpointer = ckpt.Checkpointer(self.directory, keep=keep, options=options(frozen="separate", **changes))
        generator = torch.Generator().manual_seed(5)

        def made(count: int) -> torch.Tensor:
            return torch.randn(count, generator=generator)

        self.frozen = {"a": made(MIB // 4), "b": made(MIB // 4).view(512, -1), "c": made(MIB // 2)}
        self.state: dict[str, Any] = {"frozen": self.frozen, "learning": made(5000), "step": 0}
        self.saved: dict[int, Any] = {}
        self.step = -1

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: Any) -> None:
        self.checkpointer.close()

    def begin(self, **more: Any) -> ckpt.PendingSave:
        self.step += 1
        self.state["learning"].add_(1)
        self.state["step"] = self.step
        self.saved[self.step] = copy_of(self.state)
        given = {self.kind: self.state, "frozen": list(self.frozen.values()), **more}
        return self.checkpointer.save(self.step, **given)

    def save(self, **more: Any) -> int:
        """Until it is durable, and right in the file. How many bytes were not written."""
        pending = self.begin(**more)
        pending.result(DEADLINE_S)
        self.check(self.step)
        return pending.stats.reused_bytes

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step:012d}"

    def file(self, step: int) -> Path:
        """With the frozen tensors."""
        return self.path(step) / ("state.frozen.pt" if self.kind == "state" else "__0_frozen_0.distcp")

    def check(self, *steps: int) -> None:
        for step in steps:
            assert_same(self.saved[step], self.load(step))
            if self.kind == "state" and self.file(step).exists():
                expected, found = dict_of(self.saved[step]["frozen"]), torch.load(self.file(step))
                assert found and list(found) == [name for name in expected if name in found]
                assert_same({name: expected[name] for name in found}, found)
                for name in ("state.pt", "state.frozen.pt"):
                    with zipfile.ZipFile(self.path(step) / name) as archive:
                        assert archive.testzip() is None

    def load(self, step: int) -> Any:
        if self.kind == "state":
            return ckpt.load(self.path(step))
        import torch.distributed.checkpoint as dcp

        target = copy_of(self.state, torch.zeros_like) | {"step": -1}
        dcp.load(target, checkpoint_id=str(self.path(step)), no_dist=True)
        return target


def dict_of(frozen: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As it stands in the file by itself."""
    return {f"frozen.{name}": tensor for name, tensor in frozen.items()}


def copy_of(state: Any, how: Callable[[torch.Tensor], torch.Tensor] = torch.clone) -> Any:
    if isinstance(state, dict):
        return {key: copy_of(value, how) for key, value in state.items()}
    return how(state) if torch.is_tensor(state) else state


def overwritten(path: Path) -> None:
    """Nothing tells of it but the time of the change."""
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(MIB)
        file.write(b"\xff" * 4096)
    path.chmod(0o444)
