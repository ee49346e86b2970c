"""The benchmarks of ckpt: one driver, named workloads, one JSON line a result and a table for the reader.

    python -m bench.run                                   all workloads at full size, less than ten minutes
    python -m bench.run --workload stall --workload crc   some of them
    python -m bench.run --scale 0.01 --rounds 2           quickly, to see that all works; no bar is judged
    python -m bench.run --workload sweep                  writer threads x chunk sizes; not part of "all"
    python -m bench.run --workload coordination           how long many ranks need to agree; not part of "all"
    python -m bench.run --workload deepspeed              beside DeepSpeed's own checkpoint engines; not part of "all"
    python -m bench.run --workload gpu                    saving from a GPU; needs one; not part of "all"
    python -m bench.run --workload rivals                 beside every other way of saving that runs here; not part of "all"
    python -m bench.run --workload frequency              a save every 10 to every iteration; not part of "all"
    python -m bench.run --workload sizes                  10 MB to 8 GB, 10 to 100,000 tensors; not part of "all"
    python -m bench.run --workload small                  1 MiB, beside torch.save and its fsyncs; not part of "all"
    python -m bench.run --workload reuse                  a state that changes in part; needs XFS or btrfs; not part of "all"
    python -m bench.run --workload frozen-files           what does not change in a file of its own; not part of "all"
    python -m bench.run --workload restore                how fast a state comes back, beside others; not part of "all"
    python -m bench.run --workload safetensors            safetensors files beside save_file and load_file; not part of "all"
    python -m bench.run --workload sharded                sharded states beside DCP, by two ranks; not part of "all"
    python -m bench.run --workload tiers                  a slow home, by way of the node's disk; not part of "all"
    python -m bench.run --workload object                 to an object store and back; not part of "all"
    python -m bench.run --workload lightning              beside Lightning's own checkpoints; not part of "all"
    python -m bench.run --workload accelerate             beside accelerate's own save_state(); not part of "all"
    python -m bench.run --workload transformers           beside the Trainer's own checkpoints; not part of "all"

Exits with 1 if a workload failed. A bar that is missed is a result, not a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.deepspeed_engines.workload import measure_deepspeed
from bench.measure import fio
from bench.measure.machine import ROOT, describe_run
from bench.measure.report import Report, table
from bench.measure.sampling import Settings, clock, note
from bench.workloads.coordination import measure_coordination
from bench.workloads.crc import measure_crc
from bench.workloads.durable import measure_durable, measure_sweep
from bench.workloads.frequency import measure_frequency
from bench.workloads.many import measure_many
from bench.workloads.memory import measure_memory
from bench.workloads.metrics import measure_metrics
from bench.workloads.restore import measure_restore
from bench.workloads.reuse import measure_frozen_files, measure_reuse
from bench.workloads.rivals import measure_rivals
from bench.workloads.sizes import measure_sizes
from bench.workloads.small import measure_small
from bench.workloads.stall import measure_overhead, measure_stall


def measure_gpu(settings: Settings, report: Report) -> None:
    from bench.gpu.workload import measure_gpu  # with the rivals of torch.distributed, which the others need not import

    measure_gpu(settings, report)


def measure_safetensors(settings: Settings, report: Report) -> None:
    from bench.workloads.safetensors_files import measure_safetensors  # with a library that the others need not import

    measure_safetensors(settings, report)


def measure_sharded(settings: Settings, report: Report) -> None:
    from bench.sharded.workload import measure_sharded  # with the same

    measure_sharded(settings, report)


def measure_tiers(settings: Settings, report: Report) -> None:
    from bench.tiers.workload import measure_tiers  # with processes of its own

    measure_tiers(settings, report)


def measure_object(settings: Settings, report: Report) -> None:
    from bench.object_store.workload import measure_object  # with the client of an object store

    measure_object(settings, report)


def measure_lightning(settings: Settings, report: Report) -> None:
    from bench.frameworks.lightning_fit import measure_lightning  # with a framework, which takes seconds to import

    measure_lightning(settings, report)


def measure_accelerate(settings: Settings, report: Report) -> None:
    from bench.frameworks.accelerate_states import measure_accelerate  # with the framework

    measure_accelerate(settings, report)


def measure_transformers(settings: Settings, report: Report) -> None:
    from bench.frameworks.trainer import measure_transformers  # with a framework, which takes seconds to import

    measure_transformers(settings, report)


WORKLOADS: dict[str, Callable[[Settings, Report], None]] = {
    "stall": measure_stall,
    "overhead": measure_overhead,
    "durable": measure_durable,
    "memory": measure_memory,
    "many": measure_many,
    "crc": measure_crc,
}
ON_REQUEST: dict[str, Callable[[Settings, Report], None]] = {
    "sweep": measure_sweep,
    "coordination": measure_coordination,
    "deepspeed": measure_deepspeed,
    "gpu": measure_gpu,
    "rivals": measure_rivals,
    "frequency": measure_frequency,
    "sizes": measure_sizes,
    "small": measure_small,
    "reuse": measure_reuse,
    "frozen-files": measure_frozen_files,
    "restore": measure_restore,
    "metrics": measure_metrics,
    "safetensors": measure_safetensors,
    "sharded": measure_sharded,
    "tiers": measure_tiers,
    "object": measure_object,
    "lightning": measure_lightning,
    "accelerate": measure_accelerate,
    "transformers": measure_transformers,
}
CHILD_TIMEOUT_S = 3600
BUSY = 0.25  # load for each core above which a machine is not idle


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = [*WORKLOADS, *ON_REQUEST]
    parser.add_argument(
        "--workload", action="append", choices=choices, help=f"may be repeated; default: all but {', '.join(ON_REQUEST)}"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all sizes; below 1 no bar is judged")
    parser.add_argument("--rounds", type=int, help="samples of each side; default: as the workload has it")
    parser.add_argument("--directory", type=Path, default=ROOT / "out" / "bench", help="where files are written and removed")
    parser.add_argument(
        "--iteration-s", type=float, help="forward + backward, seconds; default: twice a flush, and at least 2.5"
    )
    parser.add_argument("--rest-s", type=float, default=0.3, help="rest before each sample, seconds")
    parser.add_argument("--fio", metavar="GRID", help="configurations engine:depth:block, separated by commas; 'none': no fio")
    parser.add_argument(
        "--rivals", metavar="NAMES", help="parts of the names of those to measure beside ours (all workloads that have rivals)"
    )
    parser.add_argument(
        "--parts",
        metavar="NAMES",
        help="some of blocked, early, rate, iterations, restore (gpu); of blocked, restore, planning (sharded); of training, "
        "drain, recovery (tiers)",
    )
    parser.add_argument(
        "--pretend-cuda", type=Path, metavar="LIBRARY", help="a stand-in for the CUDA driver, to see that gpu works without one"
    )
    parser.add_argument("--out", type=Path, help="where the JSON lines go; default: standard output, before the table")
    parser.add_argument("--one-process", action="store_true", help="run all workloads in this process, not each in its own")
    return parser.parse_args(arguments)


def fio_grid(asked: str | None) -> tuple[str, ...]:
    """The configurations to try; empty means that the direct-write loop of this program stands in for fio."""
    if asked == "none":
        return ()
    if not fio.available():
        text = "fio is not installed: the disk's limit is taken from this program's own direct-write loop, and named so"
        print(text, file=sys.stderr)
        return ()
    return tuple(asked.split(",")) if asked else fio.GRID


def listed(names: str | None) -> tuple[str, ...]:
    return tuple(names.split(",")) if names else ()


def run_here(names: list[str], settings: Settings, report: Report) -> list[str]:
    """Runs the workloads in this process; returns those that failed."""
    failed = []
    for name in names:
        started = clock()
        try:
            (WORKLOADS | ON_REQUEST)[name](settings, report)
        except Exception as error:  # the others are still worth their time
            print(f"\n{name} failed: {type(error).__name__}: {error}", file=sys.stderr)
            failed.append(name)
        note("")
        print(f"{name}: {clock() - started:.0f} s", file=sys.stderr)
    return failed


def run_child(command: list[str]) -> int:
    """If this process is asked to end meanwhile, the child is, too, and ends what it has started.

    Raises:
        subprocess.TimeoutExpired: it has taken CHILD_TIMEOUT_S.
    """
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        return child.wait(CHILD_TIMEOUT_S)
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()


def end_when_asked(*_: object) -> None:
    """Of SIGTERM: by way of all `finally`, which end the ranks of a workload and remove its files."""
    sys.exit(128 + signal.SIGTERM)


def run_apart(names: list[str], report: Report, arguments: list[str]) -> list[str]:
    """Runs each workload in a process of its own, so that none inherits another's memory; returns those that failed."""
    failed = []
    for name in names:
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory) / "lines"
            command = [sys.executable, "-m", "bench.run", *arguments, "--workload", name, "--one-process", "--out", str(out)]
            if run_child(command) != 0:
                failed.append(name)
            if out.exists():
                lines: list[dict[str, Any]] = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
                report.extend(lines)
    return failed


def main(arguments: list[str]) -> int:
    asked = parse(arguments)
    signal.signal(signal.SIGTERM, end_when_asked)
    names = asked.workload or list(WORKLOADS)
    report = Report(describe_run(asked.directory, asked.scale), asked.scale, asked.out)
    load = os.getloadavg()[0]
    if load > BUSY * (os.cpu_count() or 1) and not asked.one_process:
        print(f"others are using this machine (load {load:.2f}): expect noise", file=sys.stderr)
    if asked.one_process or len(names) == 1:
        grid = fio_grid(asked.fio)
        settings = Settings(
            asked.directory, asked.scale, asked.rounds, asked.iteration_s, asked.rest_s, grid,
            rivals=listed(asked.rivals), parts=listed(asked.parts), pretended_cuda=asked.pretend_cuda,
        )  # fmt: skip
        failed = run_here(names, settings, report)
    else:
        failed = run_apart(names, report, without_workloads(arguments))
    if asked.out:
        report.flush()
    else:
        for line in report.lines:
            print(json.dumps(line))
    print(table(report.lines))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def without_workloads(arguments: list[str]) -> list[str]:
    """The same command for a child that is told its own workload."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in ("--workload", "--out"):
            skip = True
        elif not argument.startswith(("--workload=", "--out=")):
            kept.append(argument)
    return kept


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
