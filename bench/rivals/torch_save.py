"""torch.save made durable: what most trainings do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from bench.measure.sampling import clock
from bench.rivals.base import Rival


def torch_save_durable(state: Any, path: Path) -> None:
    """torch.save, flush, fsync: the least that survives a power cut. No rename and no directory fsync, in its favour."""
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


class TorchSave(Rival):
    name = "torch.save + fsync"
    configuration = "torch.save to a file, flush, fsync; torch.load(weights_only=True)"
    copies = 0
    one_file = True
    crc32 = True

    def _begin(self, state: dict[str, Any], path: Path) -> None:
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(self.crc32)
        try:
            torch_save_durable(state, path)
            self.flushed_at = self.durable_at = clock()
        finally:
            torch.serialization.set_crc32_options(before)

    def _load(self, path: Path, into: dict[str, Any]) -> Any:
        return torch.load(path, weights_only=True)


class TorchSaveWithoutCrc(TorchSave):
    name = "torch.save without CRC-32 + fsync"
    configuration = f"{TorchSave.configuration}; torch.serialization.set_crc32_options(False)"
    crc32 = False
