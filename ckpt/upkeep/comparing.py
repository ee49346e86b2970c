"""In what two checkpoints, or files, differ by their structure. No tensor is read."""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Callable, Iterable, Set
from pathlib import Path

from ckpt.directory.step_names import stem_of
from ckpt.errors import CheckpointError, NotACheckpointError
from ckpt.upkeep.census import none_at
from ckpt.upkeep.contents import Contents, read_contents
from ckpt.upkeep.described import Leaf
from ckpt.upkeep.showing import look_at, tensors_in

_OPAQUE = "value"  # of torch.distributed.checkpoint, of which no contents are known


@dataclasses.dataclass(frozen=True)
class Changed:
    """What lies at the same path, and is not the same."""

    name: str
    a: str
    b: str


@dataclasses.dataclass(frozen=True)
class Difference:
    """Names that only one of the two has, what differs, and how many do not."""

    only_a: list[str]
    only_b: list[str]
    changed: list[Changed]
    same: int

    @property
    def is_none(self) -> bool:
        return not (self.only_a or self.only_b or self.changed)


def leaves_of(path: Path, file: str) -> dict[str, Leaf]:
    """By their paths; where a checkpoint has several files, that of the file is put before.

    Raises:
        NotACheckpointError: there is no such file.
        CheckpointError: it cannot be understood.
    """
    if file and not os.path.lexists(path / file):
        raise NotACheckpointError(f"'{path}' holds no file '{file}'")
    if not path.is_dir() or file:
        return _by_path("", read_contents(path / file if file else path), path / file)
    found: dict[str, Contents] = {}
    for name, contents in tensors_in(look_at(path)).items():
        if not isinstance(contents, Contents):
            raise contents
        found[name] = contents
    if not found:
        raise none_at(path, "no file with tensors")
    leaves: dict[str, Leaf] = {}
    for name, contents in found.items():
        leaves |= _by_path("" if len(found) == 1 else f"{stem_of(name) or name}:", contents, path / name)
    return leaves


def _by_path(prefix: str, contents: Contents, path: Path) -> dict[str, Leaf]:
    """Where several are called the same, as keys with dots are, or long ones, each has its number behind that."""
    if contents.cut:
        raise CheckpointError(f"'{path}' has more paths than anybody would look at: not all of it can be compared")
    found: dict[str, Leaf] = {}
    times: collections.Counter[str] = collections.Counter()
    for leaf in contents.leaves:
        name = called = f"{prefix}{leaf.path}"
        times[called] += 1
        if times[called] > 1:
            name = f"{called} ({times[called]})"
        while name in found:
            name += "*"
        found[name] = leaf
    return found


def compare(a: dict[str, Leaf], b: dict[str, Leaf]) -> Difference:
    """A list of values may be one value of the other, as torch.distributed.checkpoint has it."""
    common = [name for name in a if name in b]
    changed = [Changed(name, text_of(a[name]), text_of(b[name])) for name in common if not _is_same(a[name], b[name])]
    only_a, only_b = [name for name in a if name not in b], [name for name in b if name not in a]
    folded = fold(only_a, {name for name in only_b if b[name].kind == "value"}, lambda name: a[name].kind != "tensor")
    folded |= fold(only_b, {name for name in only_a if a[name].kind == "value"}, lambda name: b[name].kind != "tensor")
    parts = {part for parts in folded.values() for part in parts} | folded.keys()
    return Difference(
        only_a=[name for name in only_a if name not in parts],
        only_b=[name for name in only_b if name not in parts],
        changed=changed,
        same=len(common) - len(changed) + len(folded),
    )


def fold(names: Iterable[str], wholes: Set[str], is_value: Callable[[str], bool]) -> dict[str, list[str]]:
    """Which of the names lie in which of the others, where all that do are values."""
    found: dict[str, list[str]] = {}
    for name in names:
        at = name.find(".")
        while at >= 0:
            if name[:at] in wholes:
                found.setdefault(name[:at], []).append(name)
                break
            at = name.find(".", at + 1)
    return {whole: parts for whole, parts in found.items() if all(map(is_value, parts))}


def _is_same(a: Leaf, b: Leaf) -> bool:
    if a.kind == b.kind == "tensor":
        return (a.dtype, a.shape) == (b.dtype, b.shape)
    if "tensor" in (a.kind, b.kind):
        return False
    return _OPAQUE in (a.kind, b.kind) or (a.kind, a.text, a.mark) == (b.kind, b.text, b.mark)


def text_of(leaf: Leaf) -> str:
    return f"{leaf.dtype} {list(leaf.shape)}" if leaf.kind == "tensor" else leaf.text
