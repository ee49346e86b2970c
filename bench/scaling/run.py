"""How saving scales: the same bytes on each of more and more ranks (weak), and one model shared by them (strong).

    python -m bench.scaling.run --ranks 1,2,4,8                         on this machine: starts a job of each size
    python -m bench.scaling.run --ranks 1,2,4 --rank-rate 200MB/s       each rank writes no faster than that
    python -m bench.scaling.run --ranks 2 --rank-rate 100MB/s --node-tier /nvme  only to home; one side goes by the nodes
    torchrun --nproc-per-node 4 -m bench.scaling.run --out lines.jsonl  one size, started by a launcher; mpirun as well
    python -m bench.scaling.run --from a.jsonl b.jsonl --plot out.png   only the picture, of what was measured before

Job scripts for clusters are in bench/jobs. One JSON line a result, as bench.run writes them. What a rank does is in
rank.py, the limit in measure/rate_limit.py.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.measure.machine import ROOT, describe_run
from bench.measure.ranks import Ranks, environment_of_ranks, run_job, torchrun
from bench.measure.rate_limit import active_rate, limited, parse_rate
from bench.measure.report import Report, table
from bench.measure.sampling import Settings, column, note
from bench.scaling.rank import STRONG, WEAK, Measured, Shape, measure, shared_workspace
from ckpt.quantities import parse_size
from examples import launch

UNITS = {"rate_GBps": "GB/s"}  # of the others: seconds
HOW = {
    "rate_GBps": "bytes of all ranks, divided by durable_s",
    "durable_s": "from when all ranks have met until the slowest one knows that the whole checkpoint is durable; each rank's "
    "own clock, around the call and the wait",
    "blocked_s": "of the rank that was held up longest: clock around the call, and for ckpt around the fence after compute_s",
    "home_s": "as durable_s, which is on the nodes there, until the drain has carried it home",
    "slowest_flush_s": "from when all ranks have met until the last of them has fsynced its own data",
    "fastest_flush_s": "from when all ranks have met until the first of them has fsynced its own data",
    "commit_s": "from the slowest rank's fsync of data until rank 0 has published and told: durable_s of rank 0, less "
    "slowest_flush_s; the ranks' starts differ by as much as a barrier takes",
}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ranks", metavar="N,N", help="start a job of each size on this machine; default: this process is a rank of a job")
    add("--launcher", choices=("torchrun", "mpirun"), default="torchrun", help="what starts the jobs of --ranks")
    add("--rank-rate", metavar="RATE", help="with --ranks: each rank writes at most so much, such as 200MB/s")
    add(
        "--node-tier",
        metavar="DIRECTORY",
        type=Path,
        help="on a disk of each node: one side more saves by way of it, and --rank-rate holds only for what is written at home",
    )
    add("--kinds", default=f"{WEAK},{STRONG}", help="of scaling; default: both")
    add("--weak-bytes", default="1GiB", help="state of each rank in weak scaling")
    add("--model-bytes", default="4GiB", help="the model in strong scaling; every rank holds all of it")
    add("--compute-s", type=float, default=1.0, help="between save() and the fence each rank sleeps so long, seconds")
    add("--arena", default="512MiB", help="Options.arena_bytes of each rank")
    add("--coordinator", default="auto", choices=("auto", "torch", "mpi", "file"), help="as Checkpointer has it")
    add("--rounds", type=int, default=3, help="samples of each side")
    add("--rest-s", type=float, default=0.3, help="rest before each sample, seconds")
    add(
        "--directory",
        type=Path,
        default=ROOT / "out" / "scaling",
        help="where files are written and removed; all ranks see it",
    )
    add("--out", type=Path, help="where the JSON lines go; default: standard output, before the table")
    add("--plot", type=Path, help="a picture of the lines (PNG, PDF, SVG by its suffix)")
    add("--from", dest="sources", type=Path, nargs="+", help="measure nothing; take lines from these files")
    asked = parser.parse_args(arguments)
    if asked.rank_rate and not asked.ranks:
        parser.error("--rank-rate must be there before a rank starts: it works with --ranks only")
    return asked


# ---- one rank --------------------------------------------------------------------------------------------------------


def run_rank(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures with the others; rank 0 returns the lines, the others none."""
    place = launch.join("gloo")
    ranks = Ranks(place.rank, place.ranks)
    sizes = parse_size(asked.weak_bytes, "--weak-bytes"), parse_size(asked.model_bytes, "--model-bytes")
    shape = Shape(tuple(asked.kinds.split(",")), *sizes, asked.compute_s, asked.arena, asked.coordinator, asked.node_tier)
    settings = Settings(asked.directory, rounds=asked.rounds, rest_s=asked.rest_s)
    report = Report(common_fields(asked.directory), scale=1.0)
    with shared_workspace(ranks, settings) as directory:
        for measured in measure(ranks, shape, settings, directory):
            add_lines(report, measured, ranks, shape)
    return report.lines if ranks.rank == 0 else []


def common_fields(directory: Path) -> dict[str, Any]:
    command = shlex.join([Path(sys.executable).name, "-m", "bench.scaling.run", *sys.argv[1:]])
    return describe_run(directory, 1.0) | {"command": command}


def add_lines(report: Report, measured: Measured, ranks: Ranks, shape: Shape) -> None:
    detail = {"kind": measured.kind, "side": measured.side, "ranks": ranks.count, "nodes": ranks.nodes}
    detail |= {"rank_rate_bytes_per_s": active_rate(), "compute_s": shape.compute_s, "arena": shape.arena}
    case = f"{measured.kind}, {ranks.count} ranks: {measured.side}"
    for quantity in measured.samples[0].values:
        samples, unit = column(measured.samples, quantity), UNITS.get(quantity, "s")
        report.add("scaling", case, unit, samples, nbytes=measured.nbytes, how=HOW[quantity], **detail)


# ---- jobs on this machine --------------------------------------------------------------------------------------------


def run_jobs(asked: argparse.Namespace, arguments: list[str]) -> list[dict[str, Any]]:
    """
    Raises:
        RuntimeError: a job failed, or cannot be started.
    """
    report = Report(common_fields(asked.directory), scale=1.0)
    with tempfile.TemporaryDirectory() as scratch:
        environment = environment_of_ranks()
        if asked.rank_rate:
            below = asked.directory if asked.node_tier else None
            environment = limited(environment, parse_rate(asked.rank_rate), Path(scratch), below)
        for count in map(int, asked.ranks.split(",")):
            note(f"{count} ranks")
            out = Path(scratch) / f"{count}.jsonl"
            program = [*started_by(asked.launcher, count), "-m", "bench.scaling.run"]
            run_job([*program, *of_a_rank(arguments), "--out", str(out)], environment)
            report.extend(read_lines([out]))
    return report.lines


def started_by(launcher: str, count: int) -> list[str]:
    if launcher == "torchrun":
        return torchrun(count)
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    mpirun = shutil.which("mpirun", path=beside)
    if mpirun is None:
        raise RuntimeError("there is no mpirun on the PATH; leave out --launcher, or install an MPI and mpi4py")
    return [mpirun, "-n", str(count), "--oversubscribe", "--allow-run-as-root", sys.executable]


def of_a_rank(arguments: list[str]) -> list[str]:
    """The same command for a rank, without what its parent does."""
    kept, skip = [], False
    for argument in arguments:
        name = argument.partition("=")[0]
        if skip:
            skip = False
        elif name in ("--ranks", "--launcher", "--rank-rate", "--out", "--plot"):
            skip = "=" not in argument
        else:
            kept.append(argument)
    return kept


def read_lines(paths: list[Path]) -> list[dict[str, Any]]:
    lines = [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["workload"] == "scaling"]


def overview(lines: list[dict[str, Any]]) -> str:
    """How far the rate of each side has come from the fewest ranks to the most."""
    curves: dict[tuple[str, str], dict[int, float]] = {}
    for line in lines:
        if line["quantity"] == "rate_GBps":
            curve = curves.setdefault((line["detail"]["kind"], line["detail"]["side"]), {})
            curve[line["detail"]["ranks"]] = line["value"]
    text = []
    for (kind, side), curve in curves.items():
        fewest, most = min(curve), max(curve)
        if fewest < most:
            efficiency = curve[most] / curve[fewest] / (most / fewest)
            text.append(
                f"{kind} scaling, {side}: {efficiency:.0%} of the rate for each rank left from {fewest} to {most} ranks"
            )
    return "\n".join(text)


def main(arguments: list[str]) -> int:
    asked = parse(arguments)
    if asked.sources:
        lines = read_lines(asked.sources)
    elif asked.ranks:
        lines = run_jobs(asked, arguments)
        note("")
    else:
        lines = run_rank(asked)
        if not lines:
            return 0  # rank 0 says what there is to say
    if asked.out:
        report = Report({}, 1.0)
        report.lines = lines
        report.write(asked.out)
    elif not asked.sources:
        for line in lines:
            print(json.dumps(line))
    if asked.plot:
        from bench.scaling.pictures import draw

        draw(lines, asked.plot)
    print(table(lines))
    print(overview(lines))
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    launch.leave()  # a rank ends here
    sys.exit(status)
