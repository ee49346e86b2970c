"""`ckpt diff A B [--values]`"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from ckpt.cli.answer import BAD, GREEN, OK, RED, YELLOW, Answer, count, paint, plain
from ckpt.cli.progress import Progress
from ckpt.upkeep.comparing import Difference, compare, leaves_of
from ckpt.upkeep.targets import resolve

SUMMARY = """In what two checkpoints or files differ: which keys only one has, and which have another dtype, shape or value.
With --values every element of every tensor is compared."""
_SHOWN = 40  # of each kind
_NAMED = 4  # of files that were not read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A[:FILE]", help="a checkpoint, the newest of a directory, or a file")
    parser.add_argument("b", metavar="B[:FILE]", help="another one")
    parser.add_argument("--values", action="store_true", help="compare the tensors, too: the largest difference of each")
    parser.add_argument("--rank", type=int, metavar="R", help="with --values: with what this rank has saved for itself")


def run(chosen: argparse.Namespace) -> Answer:
    """
    Raises:
        CheckpointError: one of them cannot be read.
    """
    a, b = resolve(chosen.a), resolve(chosen.b)
    distances: list[Any] = []
    unread: list[str] = []
    if chosen.values:
        from ckpt.conversion.opening import left_out, open_source
        from ckpt.conversion.values import compare_values

        first, second = open_source(*a, chosen.rank), open_source(*b, chosen.rank)
        unread = sorted({*left_out(*a, chosen.rank), *left_out(*b, chosen.rank)})
        with Progress("compared", sum(entry.nbytes for entry in first.entries.values())) as told:
            found, distances = compare_values(first, second, told)
    else:
        found = compare(leaves_of(*a), leaves_of(*b))
    is_same = found.is_none and not distances
    document = {
        **{"a": chosen.a, "b": chosen.b, "same": is_same, "values": chosen.values, "alike": found.same},
        **{"only_a": found.only_a, "only_b": found.only_b},
        "changed": [dataclasses.asdict(each) for each in found.changed],
        "distances": [dataclasses.asdict(each) for each in distances],
        "not_compared": unread,
    }
    return Answer(OK if is_same else BAD, document, _lines(found, distances, unread, chosen))


def _lines(found: Difference, distances: list[Any], unread: list[str], chosen: argparse.Namespace) -> list[str]:
    lines = _some([paint(f"- {plain(name)}", RED) for name in found.only_a])
    lines += _some([paint(f"+ {plain(name)}", GREEN) for name in found.only_b])
    lines += _some([paint(f"! {plain(f'{each.name}: {each.a} -> {each.b}')}", YELLOW) for each in found.changed])
    far = sorted(distances, key=lambda each: float("inf") if each.largest is None else each.largest, reverse=True)
    for each in far[:_SHOWN]:
        largest = "NaN on one side" if each.largest is None else f"largest difference {each.largest:.6g}"
        lines.append(paint(f"~ {plain(each.name)}: {largest}, {count(each.elements, 'element')}", YELLOW))
    lines += [f"  ... and {len(far) - _SHOWN} more"] * (len(far) > _SHOWN)
    if unread:
        names = ", ".join(unread[:_NAMED]) + (", ..." if len(unread) > _NAMED else "")
        text = f"not compared: {count(len(unread), 'file')} of what ranks have saved for themselves ({plain(names)}): "
        lines.append(paint(text + "--rank R takes that of rank R, too", YELLOW))
    what = "" if chosen.values else "; values of tensors were not compared: --values does it"
    parts = [f"{len(found.only_a)} only in A", f"{len(found.only_b)} only in B", f"{len(found.changed)} changed"]
    parts += [f"{len(distances)} with other values"] * chosen.values
    return [*lines, f"{found.same} alike, {', '.join(parts)}{what}"]


def _some(lines: list[str]) -> list[str]:
    return lines if len(lines) <= _SHOWN else [*lines[:_SHOWN], f"  ... and {len(lines) - _SHOWN} more"]
