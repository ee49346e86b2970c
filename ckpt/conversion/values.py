"""By how much the tensors of two checkpoints differ: each pair is read, compared and dropped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from ckpt.conversion.sources import Entry, Source, batches, dotted, walk
from ckpt.upkeep.comparing import Changed, Difference, fold


@dataclasses.dataclass(frozen=True)
class Distance:
    """Of two tensors of the same dtype and shape.

    Attributes:
        largest: the largest difference of two elements; None: one is NaN where the other is not.
        elements: how many differ.
    """

    name: str
    largest: float | None
    elements: int


def compare_values(a: Source, b: Source, told: Callable[[int], object] = lambda _: None) -> tuple[Difference, list[Distance]]:
    """
    Raises:
        CheckpointError: one cannot be read, or is damaged.
    """
    common = [name for name in a.entries if name in b.entries]
    changed: list[Changed] = []
    distances: list[Distance] = []
    comparable: list[str] = []
    for name in common:
        first, second = a.entries[name], b.entries[name]
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            changed.append(Changed(name, _text(first), _text(second)))
        elif first.shape is None:
            values = repr(a.value(name)), repr(b.value(name))
            changed += [Changed(name, *values)] * (values[0] != values[1])
        else:
            comparable.append(name)
    for batch in batches(a.entries, comparable):
        here, there = a.tensors(batch), b.tensors(batch)
        found = [_distance(name, here[name], there[name]) for name in batch]
        distances += [distance for distance in found if distance.elements]
        told(sum(a.entries[name].nbytes for name in batch))
    only_a = [name for name in a.entries if name not in b.entries]
    only_b = [name for name in b.entries if name not in a.entries]
    alike = [*_folded(a, only_a, b, only_b), *_folded(b, only_b, a, only_a)]
    parts = {part for parts in alike for part in parts}
    same = len(common) - len(changed) - len(distances) + len(alike)
    return Difference(
        [name for name in only_a if name not in parts], [name for name in only_b if name not in parts], changed, same
    ), distances


def _folded(parts_of: Source, names: list[str], wholes_of: Source, others: list[str]) -> list[list[str]]:
    """Names of values of the one that are together one value of the other; with its name."""
    wholes = {name for name in others if wholes_of.entries[name].shape is None}
    found = fold(names, wholes, lambda name: parts_of.entries[name].shape is None)
    return [
        [whole, *parts]
        for whole, parts in found.items()
        if {part: repr(parts_of.value(part)) for part in parts} == _leaves(whole, wholes_of.value(whole))
    ]


def _leaves(name: str, value: Any) -> dict[str, str]:
    return {dotted((name, *path)) if path else name: repr(part) for path, part in walk(value)}


def _text(entry: Entry) -> str:
    return "a value" if entry.shape is None else f"{entry.dtype} {list(entry.shape)}".removeprefix("torch.")


def _distance(name: str, a: torch.Tensor, b: torch.Tensor) -> Distance:
    if torch.equal(a, b):
        return Distance(name, 0.0, 0)
    wide = torch.complex128 if a.is_complex() else torch.float64 if a.is_floating_point() else None
    if wide is None:
        return _distance_of_integers(name, a, b)
    first, second = a.detach().to(wide), b.detach().to(wide)
    alike = (first == second) | (first.isnan() & second.isnan())
    elements = int((~alike).sum())
    gap = (first - second).abs()[~alike]
    largest = float(gap.max()) if elements else 0.0
    return Distance(name, None if largest != largest else largest, elements)


def _distance_of_integers(name: str, a: torch.Tensor, b: torch.Tensor) -> Distance:
    unlike = a != b
    elements = int(unlike.sum())
    if not elements:
        return Distance(name, 0.0, 0)
    pairs = zip(a[unlike].tolist(), b[unlike].tolist(), strict=True)  # whose difference may not fit the dtype
    return Distance(name, float(max(abs(int(one) - int(other)) for one, other in pairs)), elements)
