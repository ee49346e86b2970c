"""Train a GPT checkpointed every iteration, kill it, resume it, and show what the saving cost.

    python examples/demo.py

Short trainings of one model, each in its own process: without saving, with ckpt, with ckpt by way of
a fast disk where checkpoints come to a slow home behind the training's back, and with torch.save +
fsync; then those that are compared again in reverse order, so that a machine that gets slower or
faster meanwhile favours none of them. In between, one is killed with SIGKILL, and resumed from what
the fast disk has. All must end in the same state, bit for bit: model, optimizer, schedule, random
streams, place in the data.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from runs import WARM_UP, DemoFailed, Record, Run, Stage

NAMES = {"none": "no saving", "lazy": "ckpt", "node": "ckpt, slow home", "torch": "torch.save + fsync"}
HOME_S = 4.0  # that one checkpoint takes to a slow home
KEPT_STATES = 9  # room for this many states on disk: five kept, up to three under way, and one to spare
TIME_LIMIT_S = 165.0  # the second round is left out if it would end later than this


def state_bytes(args: argparse.Namespace) -> int:
    """About what one checkpoint takes: weights and two AdamW moments, four bytes each."""
    parameters = 12 * args.layers * args.width**2 + (256 + args.context) * args.width
    return 12 * parameters


def check_disk(args: argparse.Namespace) -> None:
    needed, free = KEPT_STATES * state_bytes(args), shutil.disk_usage(args.out).free
    if free < needed:
        raise DemoFailed(
            f"this needs {needed / 1e9:.1f} GB of free disk in {args.out}, and there are "
            f"{free / 1e9:.1f} GB: make room there, or name another directory with --out"
        )


def run_all(stage: Stage) -> tuple[list[Run], Run, Run]:
    """Every measured run, the killed one, and the resumed one."""
    began = time.monotonic()
    runs = [announced(stage, engine) for engine in ("none", "lazy", "node", "torch")]
    round_s = time.monotonic() - began
    say("\n  ckpt, slow home, then SIGKILL at a random moment, then --resume from the disk of the node")
    killed, resumed = stage.kill_and_resume()
    at = resumed.start["resumed_from"]
    say(f"      killed after iteration {len(killed.iterations)}, resumed from the save of {at}")
    elapsed = time.monotonic() - began
    # Another round takes as long as the first did, or 2.5 times the killed run with its second start: whichever was
    # not held up by something else on the machine.
    if elapsed + min(round_s, 2.5 * (elapsed - round_s)) > TIME_LIMIT_S:
        say("\n  (a slow or busy machine: the second round is left out, so the times are less certain)")
    else:
        runs += [announced(stage, engine) for engine in ("torch", "lazy", "none")]
    return runs, killed, resumed


def announced(stage: Stage, engine: str) -> Run:
    say(f"\n  {NAMES[engine]}")
    run = stage.measure(engine)
    if not sys.stderr.isatty():  # nobody saw the progress bar
        seconds = statistics.median(r["seconds"] for r in run.iterations)
        say(f"      {len(run.iterations)} iterations, {seconds:.2f} s each")
    return run


def summarise(runs: list[Run]) -> dict[str, Record]:
    """For each way of saving: medians over all its runs, in seconds."""
    table: dict[str, Record] = {}
    for engine in NAMES:
        mine = [run for run in runs if run.engine == engine]
        steady = [r for run in mine for r in run.iterations[WARM_UP:]]
        saves = [r for run in mine for r in run.saves[WARM_UP:]]
        seconds = [r["seconds"] for r in steady]
        low, middle, high = statistics.quantiles(seconds, n=4)
        row = {"iteration_s": middle, "iteration_quartiles_s": [low, high]}
        if saves:
            row["blocked_s"] = statistics.median(r["blocked_s"] for r in steady)
            durable = [r["tier_at"].get("node", r["durable_at"]) - r["started_at"] for r in saves]
            row["durable_s"] = statistics.median(durable)
            home = [r["durable_at"] - r["started_at"] for r in saves if r["tier_at"] and r["durable_at"] is not None]
            if home:
                row["home_s"] = statistics.median(home)
                row["came_home"] = len(home) / len(saves)
            row["overhead"] = middle / table["none"]["iteration_s"] - 1.0
        table[engine] = row
    return table


def print_table(table: dict[str, Record]) -> None:
    def line(title: str, cells: list[str]) -> None:
        say(f"  {title:<36}" + "".join(f"{cell:>20}" for cell in cells))

    def row(title: str, key: str, show: Any) -> None:
        line(title, [show(table[e][key]) if key in table[e] else "-" for e in NAMES])

    line("", list(NAMES.values()))
    line("", ["", *["every iteration"] * (len(NAMES) - 1)])
    say("  " + "-" * (36 + 20 * len(NAMES)))
    row("iteration, median", "iteration_s", milliseconds)
    row("  the middle half of them", "iteration_quartiles_s", span)
    row("training blocked per save, median", "blocked_s", milliseconds)
    row("save() to durable, median", "durable_s", milliseconds)
    row("save() to home, if it comes there", "home_s", milliseconds)
    row("  how many of them do", "came_home", "{:.0%}".format)
    row("overhead against no saving", "overhead", "{:+.1%}".format)
    ratio = table["torch"]["blocked_s"] / table["lazy"]["blocked_s"]
    say(f"\n  torch.save + fsync blocks training {ratio:.3g} times as long as ckpt does.")
    if busy(table):
        say("  Something else kept this machine busy: iteration times and overhead mean little. Run it again.")
    else:
        say("  Between iteration times, a difference smaller than the spread of the middle halves is noise.")


def busy(table: dict[str, Record]) -> bool:
    """Whether the iteration times differ more than training by itself makes them."""
    spreads = [(row["iteration_quartiles_s"], row["iteration_s"]) for row in table.values()]
    uneven = any(high - low > 0.3 * middle for (low, high), middle in spreads)
    return uneven or any(row.get("overhead", 0.0) < -0.1 for row in table.values())


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms" if seconds < 0.1 else f"{1e3 * seconds:.0f} ms"


def span(low_high: list[float]) -> str:
    low, high = low_high
    return f"{1e3 * low:.0f} - {1e3 * high:.0f} ms"


def checks(runs: list[Run], killed: Run, resumed: Run) -> dict[str, bool]:
    reference = runs[0]
    losses = {r["step"]: r["loss_hex"] for r in reference.iterations}
    ours = [run for run in runs if run.engine in ("lazy", "node")]
    rival = [run for run in runs if run.engine == "torch"]
    at = resumed.start["resumed_from"]
    return {
        "killed with SIGKILL, it resumed from a checkpoint": at > 0,
        "killed and resumed, it ends in the reference's state": resumed.digest == reference.digest,
        "its losses before and after are the reference's": all(
            losses[r["step"]] == r["loss_hex"] for r in killed.iterations + resumed.iterations
        ),
        "uninterrupted with ckpt, it ends there too": all(r.digest == reference.digest for r in ours),
        "with torch.save + fsync, it ends there too": all(r.digest == reference.digest for r in rival),
    }


def machine() -> Record:
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def write_picture(runs: list[Run], path: Path) -> str:
    try:
        from timeline import draw
    except ImportError:
        return "left out: it needs matplotlib"
    shown = {}  # of each way the run that was disturbed least
    for run in sorted(runs, key=lambda run: statistics.median(r["seconds"] for r in run.iterations), reverse=True):
        shown[run.engine] = run
    draw([(NAMES[e], shown[e].iterations, shown[e].saves) for e in NAMES], path)
    return str(path)


def say(text: str) -> None:
    print(text, flush=True)


MODEL_FLAGS = ("layers", "width", "context", "batch", "threads")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train, kill, resume and compare: ckpt beside torch.save, in a few minutes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/demo"), help="the picture and the results go here")
    add("--iterations", type=int, default=12, help="in each run")
    add("--layers", type=int, default=6)
    add("--width", type=int, default=512)
    add("--context", type=int, default=128)
    add("--batch", type=int, default=8)
    add("--threads", type=int, default=2, help="for computing; 2 makes machines comparable")
    args = parser.parse_args()
    if args.iterations < WARM_UP + 4:
        parser.error(f"--iterations: at least {WARM_UP + 4}")
    return args


def demo(args: argparse.Namespace) -> bool:
    began = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    check_disk(args)
    size = state_bytes(args)
    say(f"A GPT with {size / 12e6:.1f} million parameters learns the Python documentation.")
    say(f"{size / 1e6:.0f} MB of training state, {args.iterations} iterations a run, saved in every")
    say(f"one of them to {args.out.resolve()}. A slow home gets {size / HOME_S / 1e6:.0f} MB a second.")
    with tempfile.TemporaryDirectory(prefix="work-", dir=args.out) as work:
        flags = [f"--{name}={getattr(args, name)}" for name in MODEL_FLAGS]
        runs, killed, resumed = run_all(Stage(args.iterations, flags, Path(work), int(size / HOME_S)))
    table, checked = summarise(runs), checks(runs, killed, resumed)
    say("")
    print_table(table)
    say("")
    for what, good in checked.items():
        say(f"  {'yes' if good else 'NO '}  {what}")
    picture = write_picture(runs, args.out / "timeline.png")
    results = {
        "passed": all(checked.values()),
        "seconds": time.monotonic() - began,
        "parameters": runs[0].start["parameters"],
        "bytes_per_save": max(r["bytes_total"] for run in runs for r in run.saves),
        "flags": {name: getattr(args, name) for name in ("iterations", *MODEL_FLAGS)},
        "table": table,
        "machine_was_busy": busy(table),
        "checks": checked,
        "digest": runs[0].digest,
        "machine": machine(),
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    say(f"\n  timeline  {picture}\n  results   {args.out / 'results.json'}")
    verdict = "PASS  every final state is the same, bit for bit" if results["passed"] else "FAIL"
    say(f"\n{verdict}  ({results['seconds']:.0f} s)")
    return bool(results["passed"])


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that cleaning up still happens
    try:
        return 0 if demo(parse_args()) else 1
    except DemoFailed as failure:
        say(f"\nFAIL  {failure}")
    except KeyboardInterrupt:
        say("\nstopped")
    return 1


if __name__ == "__main__":
    sys.exit(main())
