"""Programs of children that are killed: a job that saves bundles, and a repair."""

from __future__ import annotations

import os
from typing import Any

import torch

import ckpt
from ckpt import _native
from ckpt.cli.main import main

OPTIONS = ckpt.Options(arena_bytes="1MiB", chunk_bytes="64KiB", writers=2, timeout_s=60, drain_timeout_s=60)
FILES = ("model.pt", "optimizer.pt")


def content(value: float) -> dict[str, Any]:
    return {"w": torch.full((1000,), value)}


def save_bundle_twice(root: str, name: str, point: str, named_last: bool) -> None:
    """The second time it is killed."""
    bundles = ckpt.BundleCheckpointer(options=OPTIONS)
    for value in (1.0, 2.0):
        bundle = bundles.begin(root, name, named_last=named_last)
        if value == 2.0:  # before anything is on its way to that point
            _native.set_crash_point(point, 0)
        for file in FILES:
            bundle.save(content(value), bundle.directory / file)
        bundle.commit().result()
    os._exit(0)


def repair(directory: str, point: str) -> None:
    _native.set_crash_point(point, 0)
    os._exit(main(["repair", directory, "--yes"]))
