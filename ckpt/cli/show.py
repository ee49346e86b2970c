"""`ckpt show PATH[:FILE] [--tensors GLOB] [--tree]`"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import itertools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ckpt.cli.answer import BAD, OK, RED, YELLOW, Answer, cost, count, metrics, paint, plain, size, table
from ckpt.errors import CheckpointError, NotACheckpointError
from ckpt.upkeep.contents import Contents, read_contents
from ckpt.upkeep.described import Leaf
from ckpt.upkeep.showing import Checkpoint, FileRow, look_at, tensors_in
from ckpt.upkeep.targets import resolve

SUMMARY = """What a checkpoint or a file consists of: manifest, files, tensors. Reads files of this library, of torch, of
torch.distributed.checkpoint and safetensors. No pickle is run, and no tensor is read."""
_FIRST = 40  # rows, of a file that was not asked for its tensors


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = (
        "a checkpoint, a file in one (run1/step-000000000042:state.pt), a step (run1:42), the newest of a directory, or a file"
    )
    parser.add_argument("path", metavar="PATH[:FILE]", help=text)
    parser.add_argument("--tensors", metavar="GLOB", help="all tensors and values whose path matches, as 'model.layers.0.*'")
    parser.add_argument("--tree", action="store_true", help="as a tree of keys, with the bytes below each")


def run(chosen: argparse.Namespace) -> Answer:
    """
    Raises:
        CheckpointError: there is no such thing, or it cannot be understood.
    """
    path, name = resolve(chosen.path)
    if path.is_dir() and not name:
        return _show_checkpoint(look_at(path), chosen)
    file = _file_in(path, name) if name else path
    contents = read_contents(file)
    document = {"path": str(file), "files": {file.name: _as_document(contents, chosen.tensors)}}
    lines = [f"{plain(str(file))}: {_headline(contents)}", *_tensor_lines(contents, chosen)]
    return Answer(OK, document, lines)


def _file_in(directory: Path, name: str) -> Path:
    if not (directory / name).is_file() or Path(name).is_absolute() or ".." in Path(name).parts:
        raise NotACheckpointError(f"'{directory}' holds no file '{name}'")
    return directory / name


def _show_checkpoint(checkpoint: Checkpoint, chosen: argparse.Namespace) -> Answer:
    wanted = chosen.tensors is not None or chosen.tree
    found = tensors_in(checkpoint) if wanted else {}
    bad = any(row.problem for row in checkpoint.files) or any(isinstance(each, Exception) for each in found.values())
    document: dict[str, Any] = {"path": str(checkpoint.path), "manifest": _manifest(checkpoint)}
    document["files"] = {row.name: dataclasses.asdict(row) for row in checkpoint.files}
    lines = [*_about(checkpoint), "", *_file_lines(checkpoint.files)]
    for name, each in found.items():
        if isinstance(each, CheckpointError):
            document["files"].setdefault(name, {})["error"] = str(each)
            lines += ["", paint(plain(f"{name}: {each}"), RED)]
        elif isinstance(each, Contents):
            document["files"].setdefault(name, {}).update(_as_document(each, chosen.tensors))
            lines += ["", f"{plain(name)}: {_headline(each)}", *_tensor_lines(each, chosen)]
    return Answer(BAD if bad else OK, document, lines)


def _manifest(checkpoint: Checkpoint) -> dict[str, Any] | None:
    manifest = checkpoint.manifest
    if manifest is None:
        return None
    fields = {name: getattr(manifest, name) for name in ("step", "sequence", "world_size", "created", "bundle")}
    return {**fields, "others": list(manifest.others), "metrics": dict(manifest.metrics), "cost": dict(manifest.cost)}


def _about(checkpoint: Checkpoint) -> list[str]:
    path, manifest = plain(str(checkpoint.path)), checkpoint.manifest
    total = size(sum(row.bytes for row in checkpoint.files))
    if manifest is None:
        return [f"{path}: no checkpoint of this library; {count(len(checkpoint.files), 'file')}, {total}"]
    when = f", committed {manifest.created[:19].replace('T', ' ')} UTC" if manifest.created else ""
    ranks = f"saved by {count(manifest.world_size, 'rank')}"
    of = " of rank 0" if manifest.world_size > 1 else ""
    return [
        f"{path}: step {manifest.step}, commit {manifest.sequence}{when}",
        f"{ranks}; {count(len(manifest.files), 'file')}, {total}",
        *[cost(manifest.cost, manifest.world_size)] * bool(manifest.cost),
        *[plain(f"metrics{of}: {metrics(dict(manifest.metrics))}")] * bool(manifest.metrics),
    ]


def _file_lines(files: list[FileRow]) -> list[str]:
    cells = [
        [row.name, size(row.bytes), row.kind, "" if row.rank is None else str(row.rank), row.crc32, row.problem]
        for row in files
    ]
    lines = table(["file", "size", "kind", "rank", "CRC-32", ""], cells, right=(1, 3))
    shared = [
        f"{plain(row.name)}: {size(row.shared_bytes)} were not written, but shared with step {row.shared_step}"
        for row in files
        if row.shared_bytes
    ]
    marked = (paint(line, RED) if row.problem else line for line, row in zip(lines[1:], files, strict=True))
    return [lines[0], *marked, *shared]


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _matching(leaves: Iterable[Leaf], pattern: str | None) -> list[Leaf]:
    match = None if pattern is None else re.compile(fnmatch.translate(pattern)).match
    return [leaf for leaf in leaves if match is None or match(leaf.path)]


def _as_document(contents: Contents, pattern: str | None) -> dict[str, Any]:
    leaves = _matching(contents.leaves, pattern)
    tensors = [
        {"name": leaf.path, "dtype": leaf.dtype, "shape": leaf.shape, "bytes": leaf.bytes, "record": leaf.record}
        for leaf in leaves
        if leaf.kind == "tensor"
    ]
    values = [{"name": leaf.path, "type": leaf.kind, "value": leaf.text} for leaf in leaves if leaf.kind != "tensor"]
    return {
        **{"format": contents.format, "bytes": contents.bytes, "checksummed": contents.checksummed},
        **{"tensors": tensors, "values": values, "cut": contents.cut, "would_run": contents.foreign, "notes": contents.notes},
    }


def _headline(contents: Contents) -> str:
    tensors = [leaf for leaf in contents.leaves if leaf.kind == "tensor"]
    values = len(contents.leaves) - len(tensors)
    parts = [f"{contents.format}, {size(contents.bytes)}"]
    parts += [f"{count(len(tensors), 'tensor')} of {size(sum(leaf.bytes for leaf in tensors))}"] * bool(tensors)
    parts += [count(values, "value")] * bool(values) + [plain(note) for note in contents.notes]
    return "; ".join(parts)


def _tensor_lines(contents: Contents, chosen: argparse.Namespace) -> list[str]:
    lines = []
    if contents.foreign:
        names = plain(", ".join(contents.foreign[:_MOST_NAMED])) + (", ..." if len(contents.foreign) > _MOST_NAMED else "")
        lines.append(paint(f"it refers to {names}: load it only if you trust it (weights_only=True refuses it)", YELLOW))
    leaves = _matching(contents.leaves, chosen.tensors)
    if chosen.tensors is None:
        leaves = _folded(leaves)
    if chosen.tree:
        return [*lines, *_tree_lines(leaves)]
    some = leaves if chosen.tensors is not None else leaves[:_FIRST]
    rows = [[leaf.path, *_what(leaf), size(leaf.bytes) if leaf.kind == "tensor" else ""] for leaf in some]
    lines += table(["name", "type", "shape or value", "bytes"], rows, right=(3,)) if rows else []
    if len(some) < len(leaves):
        lines.append(f"... and {len(leaves) - len(some)} more: --tensors '*' shows all")
    return [*lines, "there are more paths than can be shown"] if contents.cut else lines


def _folded(leaves: list[Leaf]) -> list[Leaf]:
    """The same, but long lists of plain numbers, as states of generators have them, in one line each."""
    folded: list[Leaf] = []
    for (above, kind), found in itertools.groupby(leaves, lambda leaf: (leaf.path.rpartition(".")[0], leaf.kind)):
        group = list(found)
        if kind not in _NUMBERS or len(group) < _LONG or not all(leaf.path.rpartition(".")[2].isdecimal() for leaf in group):
            folded += group
            continue
        first, last = group[0].path.rpartition(".")[2], group[-1].path.rpartition(".")[2]
        shown = ", ".join(leaf.text for leaf in group[:_SHOWN])
        path = above if above and first == "0" else f"{above}.{first}-{last}".lstrip(".")
        folded.append(Leaf(path, f"{len(group)} {kind}s", text=f"{shown}, ..."))
    return folded


def _what(leaf: Leaf) -> tuple[str, str]:
    if leaf.kind != "tensor":
        return leaf.kind, leaf.text
    return leaf.dtype, "x".join(map(str, leaf.shape)) or "scalar"


_MOST_NAMED = 12  # of what a pickle refers to
_NUMBERS = ("int", "float", "bool")
_LONG, _SHOWN = 16, 4  # numbers in a list that is one line, and those of them that are in it


class _Node(dict[str, "_Node"]):
    """A key: what lies below it, how many bytes of tensors that is, and what it is itself."""

    bytes = 0
    text = ""


def _tree_lines(leaves: list[Leaf]) -> list[str]:
    root = _Node()
    for leaf in leaves:
        node = root
        for part in leaf.path.split("."):
            node = node.setdefault(part, _Node())
            node.bytes += leaf.bytes
        node.text = "  ".join(each for each in _what(leaf) if each)
    return _branches(root)


def _branches(root: Mapping[str, _Node]) -> list[str]:
    lines = []
    waiting = [(0, name, node) for name, node in reversed([*root.items()])]
    while waiting:
        depth, name, node = waiting.pop()
        amount = size(node.bytes) if node.bytes else ""
        lines.append("  ".join(each for each in (f"{'  ' * depth}{plain(name)}", plain(node.text), amount) if each))
        waiting += [(depth + 1, below, part) for below, part in reversed([*node.items()])]
    return lines
