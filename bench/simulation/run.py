"""Saving on machines that are not here, simulated event by event. The model is described in simulation/model.py.

    python -m bench.simulation.run                  all studies; some minutes
    python -m bench.simulation.run --study publishedbeside the published numbers of DataStates-LLM
    python -m bench.simulation.run --study scale    on to 1,024 and 16,384 GPUs: which level is the limit, at which interval
    python -m bench.simulation.run --study validate against real saves on this machine

One JSON line a run of the simulation (standard output, or --out), tables for the reader, and pictures with --plots. Needs
simpy, and for pictures matplotlib.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.measure.machine import ROOT, describe_run
from bench.measure.rate_limit import parse_rate
from bench.measure.report import Report
from bench.measure.sampling import Settings, note
from bench.simulation.published import SOURCES, published
from bench.simulation.scale import (
    AGE_EXPLANATION,
    ARENA_EXPLANATION,
    EXPLANATION,
    SIZES,
    Study,
    age_rows,
    arena_rows,
    cases,
    critical_rows,
    study,
)
from bench.simulation.validate import validate

STUDIES = ("published", "scale", "validate")

WHY = """\
paper: what DataStates-LLM measured. lazy: this library's rules with device_lazy=True. copied: with device_lazy=False, save()
itself copies to the host.
In the model the copies of a GPU (0.4 to 0.6 s) fit into forward and backward of every row, and five checkpoints fit through
arena and links in time; so a lazy save costs no more than its planning (plan_s, measured with tensors on the host). The paper's
times lie near those of copying inside save() for 3B and 7B, and grow with the iteration, not with the bytes of a GPU. A slow
file system could cause that, but it would have to be a slower one for each larger model (last column). The model leaves out
what else may hold a real run up: planning with tensors on devices, copies that disturb the training's own traffic, memory
pinned during the first save, Python in between, other users of the file system. So "lazy" is a bound that this hardware would
allow, not a speed that was reached; nothing here was run on a GPU."""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--study", action="append", choices=STUDIES, help="may be repeated; default: all")
    add("--gpus", metavar="N,N", default=",".join(map(str, SIZES)), help="of the study 'scale'; multiples of 4")
    add(
        "--disk-rate",
        metavar="RATE",
        default="100MB/s",
        help="of 'validate': what the disk is limited to; 'none': the disk itself",
    )
    add("--scale", type=float, default=1.0, help="factor on the bytes that 'validate' saves")
    add("--directory", type=Path, default=ROOT / "out" / "simulation", help="where 'validate' writes files and removes them")
    add("--out", type=Path, help="where the JSON lines go; default: standard output, before the tables")
    add("--plots", type=Path, metavar="DIRECTORY", help="where pictures go")
    return parser.parse_args(arguments)


def formatted(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def run(asked: argparse.Namespace, report: Report) -> tuple[list[str], list[Study]]:
    """(texts for the reader, what the study 'scale' has found)."""
    texts: list[str] = []
    found: list[Study] = []
    studies = asked.study or STUDIES
    if "validate" in studies:
        settings = Settings(asked.directory, asked.scale)
        rate = None if asked.disk_rate == "none" else parse_rate(asked.disk_rate)
        note("real saves, for the simulation to be held against")
        texts.append("Real saves on this machine, and the model\n" + formatted(validate(settings, report, rate)))
    if "published" in studies:
        texts.append("The published setting\n" + formatted(published(report)) + "\n" + WHY)
    if "scale" in studies:
        found = [study(report, case) for case in cases(list(map(int, asked.gpus.split(","))))]
        texts.append(f"{EXPLANATION}\n" + formatted(critical_rows(found)))
        texts.append(f"{ARENA_EXPLANATION}\n" + formatted(arena_rows(found)))
        if rows := age_rows(found):
            texts.append(f"{AGE_EXPLANATION}\n" + formatted(rows))
    if {"published", "scale"} & set(studies):
        texts.append("Where the numbers come from\n" + formatted(list(SOURCES.items())))
    return texts, found


def main(arguments: list[str]) -> int:
    asked = parse(arguments)
    command = shlex.join([Path(sys.executable).name, "-m", "bench.simulation.run", *arguments])
    report = Report(describe_run(asked.directory, asked.scale) | {"command": command}, asked.scale)
    texts, found = run(asked, report)
    note("")
    if asked.out:
        report.write(asked.out)
    else:
        for line in report.lines:
            print(json.dumps(line))
    print("\n\n".join(texts))
    if asked.plots:
        from bench.simulation.pictures import draw

        draw(report.lines, found, asked.plots)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
