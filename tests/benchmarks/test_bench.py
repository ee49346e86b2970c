"""The benchmarks at tiny sizes: what they report must be complete and honest. Speeds are not looked at."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from places import ROOT
from support import patience, wait_until

TINY = ["--scale=0.002", "--rest-s=0", "--iteration-s=0.02"]
DEADLINE_S = patience(120.0)
IN_TURN = ("stall", "durable", "many", "crc")
DEEPSPEED_ENGINES = {f"{name}CheckpointEngine" for name in ("Torch", "Fast", "Decoupled", "DataStates")}

Line = dict[str, Any]
Run = tuple[list[Line], str]  # the JSON lines, and what else was said


def run_bench(directory: Path, *arguments: str, deadline_s: float = DEADLINE_S) -> Run:
    out = directory / "lines.jsonl"
    command = [sys.executable, "-m", "bench.run", *TINY, f"--directory={directory / 'files'}", f"--out={out}"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # threads that spin for tiny work slow each other down
    done = subprocess.run([*command, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=deadline_s)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in out.read_text().splitlines()], done.stdout + done.stderr


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def runs(directory: Path) -> Iterator[tuple[Future[Run], ...]]:
    """Two runs beside each other: everything in one process, and what must have processes of its own."""
    (directory / "apart").mkdir()
    workloads = [f"--workload={name}" for name in (*IN_TURN, "overhead")]
    with ThreadPoolExecutor(2) as pool:
        together = pool.submit(run_bench, directory, *workloads, "--one-process", "--rounds=2", "--fio=none")
        apart = pool.submit(run_bench, directory / "apart", "--workload=crc", "--workload=memory", "--rounds=1")
        yield together, apart


@pytest.fixture(scope="module")
def lines(runs: tuple[Future[Run], ...]) -> list[Line]:
    return runs[0].result()[0]


def only(lines: list[Line], workload: str, case: str, quantity: str) -> Line:
    (line,) = [x for x in lines if (x["workload"], x["case"], x["quantity"]) == (workload, case, quantity)]
    return line


def check_line(line: Line) -> None:
    numbers = line["samples"]
    assert len(numbers) == len(line["started_s"]) == line["n"] > 0
    assert line["started_s"] == sorted(line["started_s"])
    assert (line["median"], line["min"], line["max"]) == (statistics.median(numbers), min(numbers), max(numbers))
    assert line["min"] <= line["p25"] <= line["median"] <= line["p75"] <= line["max"]
    assert line["bytes"] > 0
    assert line["how"]
    assert line["scale"] == 0.002
    assert line["passed"] is None, "bars are stated for full sizes"
    assert "-m bench.run" in line["command"]
    assert line["commit"]
    assert isinstance(line["uncommitted_changes"], bool)
    assert {"ckpt", "torch", "python", "native_build"} <= line["versions"].keys()
    assert {"cpu", "cores", "memory_bytes", "kernel", "file_system", "load_average_1min"} <= line["machine"].keys()
    assert line["date"].endswith("+00:00")


def test_every_line_is_complete_and_keeps_every_sample(lines: list[Line]) -> None:
    for line in lines:
        check_line(line)
    names = [(line["workload"], line["case"], line["quantity"]) for line in lines]
    assert len(names) == len(set(names))


def test_every_bar_is_there(lines: list[Line]) -> None:
    bars = [(line["workload"], line["bar"]) for line in lines if line["bar"]]
    assert bars == [("stall", "<= 0.01"), ("durable", ">= 0.95"), *[("many", "<= 0.1")] * 2, ("overhead", "<= 1.03")]


def test_sides_are_measured_in_turn(lines: list[Line]) -> None:
    for workload in IN_TURN:
        sides = {}
        for line in lines:
            if line["workload"] == workload and line["quantity"] != "ratio":
                group = line["case"].rpartition(", ")[2] if workload in ("many", "crc") else ""
                sides.setdefault(group, []).append(line["started_s"])
        for starts in sides.values():
            assert len(starts) > 1
            for this, following in zip(zip(*starts, strict=True), list(zip(*starts, strict=True))[1:], strict=False):
                assert max(this) < min(following), f"{workload}: a round began before the one before it had ended"


def test_blocks_with_and_without_saves_are_turned_around(lines: list[Line]) -> None:
    alone = only(lines, "overhead", "no saving", "iteration_s")["started_s"]
    saving = only(lines, "overhead", "ckpt every iteration", "iteration_s")["started_s"]
    order = "".join(side for _, side in sorted([*((at, "A") for at in alone), *((at, "B") for at in saving)]))
    assert order == ("AAAA" + "BBBB" * 2 + "AAAA") * (len(order) // 16)


def test_a_ratio_is_that_of_the_medians_beside_those_of_the_rounds(lines: list[Line]) -> None:
    pairs = {
        "stall": ("ckpt", "torch.save + fsync", "blocked_s"),
        "overhead": ("ckpt every iteration", "no saving", "iteration_s"),
    }
    for workload, (above, below, quantity) in pairs.items():
        (ratio,) = [line for line in lines if line["workload"] == workload and line["quantity"] == "ratio"]
        top, bottom = only(lines, workload, above, quantity), only(lines, workload, below, quantity)
        assert ratio["value"] == top["median"] / bottom["median"]
        assert ratio["samples"] == [a / b for a, b in zip(top["samples"], bottom["samples"], strict=True)]


def test_blocked_time_is_that_of_an_outside_clock(lines: list[Line]) -> None:
    outside = only(lines, "stall", "ckpt", "blocked_s")["samples"]
    inside = only(lines, "stall", "ckpt", "stats_blocked_s")["samples"]
    assert all(a >= b > 0 for a, b in zip(outside, inside, strict=True))


def test_the_best_limit_is_what_the_rate_is_held_against(lines: list[Line]) -> None:
    durable = [line for line in lines if line["workload"] == "durable"]
    limits = [line for line in durable if line["case"].startswith("own direct-write loop")]
    (judged,) = [line for line in durable if line["bar"]]
    assert judged["case"] == "ckpt / best of own loop", "without fio the limit must not bear its name"
    ours = only(durable, "durable", "ckpt", "rate_GBps")
    assert judged["value"] == ours["median"] / max(limit["median"] for limit in limits)
    assert {"ckpt", "ckpt, buffered", "torch.save + fsync"} <= {line["case"] for line in durable}


def test_nothing_is_left_behind(lines: list[Line], directory: Path) -> None:
    assert lines
    assert os.listdir(directory / "files") == []


def test_memory_in_a_process_of_its_own(runs: tuple[Future[Run], ...], directory: Path) -> None:
    lines, said = runs[1].result()
    for line in lines:
        check_line(line)
    memory = [line for line in lines if line["workload"] == "memory"]
    assert [line["bar"] for line in memory] == ["<= 576"] * 3 + [None], "the default arena of 512 MiB, and 64 MiB"
    for line in memory:
        assert 0 < line["value"] < 576, "at this size nothing can need more"
        marked, sampled = line["detail"]["marked_by_the_kernel_MiB"], line["detail"]["sampled_every_5_ms_MiB"]
        assert line["samples"] == [max(peaks) for peaks in zip(marked, sampled, strict=True)]
    assert "crc" in {line["workload"] for line in lines}
    assert "workload" in said, "there is a table for the reader"
    assert os.listdir(directory / "apart" / "files") == []


@pytest.mark.slow
def test_the_engines_of_deepspeed(tmp_path: Path) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    lines, said = run_bench(tmp_path, "--workload=deepspeed", "--rounds=1")
    for line in lines:
        check_line(line)
    names = [(line["case"], line["quantity"]) for line in lines]
    assert len(names) == len(set(names))
    assert [line["bar"] for line in lines if line["bar"]] == ["<= 1.05", "<= 0.02083", "<= 0.4545"]
    missing = {line["case"]: line["detail"]["error"] for line in lines if line["quantity"] == "runs_here"}
    assert "DataStates" in missing["DataStatesCheckpointEngine"]
    for case, error in missing.items():
        assert f"{case} cannot run here: {error}" in said
    alone = {line["case"]: line for line in lines if line["quantity"] == "durable_s"}
    assert {"ckpt", "TorchCheckpointEngine"} <= alone.keys()
    assert all(line["detail"]["file_holds_what_was_saved"] for line in alone.values())
    engines = {line["case"] for line in lines if line["quantity"] in ("call_s", "runs_here")} - {"ckpt", "nothing written"}
    assert {engine.partition(",")[0] for engine in engines} == DEEPSPEED_ENGINES, "each of them runs, or says why not"
    assert only(lines, "deepspeed", "ckpt, memory", "extra_MiB")["n"] == 1
    for case in alone:
        for setting, length in (("compute-bound", 3), ("flush-bound", 5)):
            blocked = only(lines, "deepspeed", f"{setting}: {case}", "blocked_s")
            assert blocked["n"] == length
            assert sum(blocked["samples"]) < only(lines, "deepspeed", f"{setting}: {case}", "total_s")["value"]
    assert os.listdir(tmp_path / "files") == []


@pytest.mark.slow
def test_ways_of_restoring(tmp_path: Path) -> None:
    lines, _ = run_bench(tmp_path, "--workload=restore", "--rounds=1", "--fio=none")
    for line in lines:
        check_line(line)
    times = {line["case"]: line["value"] for line in lines if line["quantity"] == "load_s"}
    peaks = {line["case"]: line for line in lines if line["quantity"] == "extra_MiB"}
    assert times.keys() == peaks.keys() and len(times) == 7
    for line in (line for line in lines if line["quantity"] == "ratio"):
        ours, other = line["case"].split(" / ")
        assert line["value"] == pytest.approx(times[ours] / times[other])
    assert [line["bar"] for line in lines if line["quantity"] == "ratio"] == ["<= 0.5", "<= 1", "<= 1", "<= 1"]
    assert peaks["ckpt.load_into"]["bar"] == "<= 64"
    assert os.listdir(tmp_path / "files") == []


@pytest.mark.slow
def test_safetensors_files(tmp_path: Path) -> None:
    lines, _ = run_bench(tmp_path, "--workload=safetensors", "--rounds=1", "--fio=none")
    for line in lines:
        check_line(line)
    assert [line["bar"] for line in lines if line["quantity"] == "ratio"] == ["<= 0.03333", ">= 1", "<= 0.7", "<= 0.7"]
    assert os.listdir(tmp_path / "files") == []


def test_bars_are_judged_at_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.measure.report import Bar, Report
    from bench.measure.sampling import Sample

    for relation, limit, value, passed in (("<=", 2.0, 2.0, True), ("<=", 1.0, 2.0, False), (">=", 3.0, 2.0, False)):
        report = Report({}, scale=1.0)
        line = report.add("w", "c", "s", [Sample(0.0, {"x": value})], nbytes=1, how="-", bar=Bar(relation, limit))
        assert line["passed"] is passed
    with pytest.raises(ValueError, match="like"):
        Report({}, 1.0).add_ratio("w", "c", [Sample(0.0, {"x": 1.0})], [Sample(0.0, {"y": 1.0})], nbytes=1, how="-")


def test_no_batch_comes_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a network knows by heart makes its gradients denormal, and each iteration slower than the one before."""
    from bench.workloads.training import Trainer

    trainer = Trainer(1 << 20)
    seen = []
    for _ in range(3):
        trainer.forward_backward()
        seen.append(trainer.tokens)
        trainer.step()
    assert len({tuple(tokens.flatten().tolist()) for tokens in seen}) == 3
    assert len({tokens.shape for tokens in seen}) == 1


def test_fio_is_asked_for_a_new_file_made_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.measure import fio

    with pytest.raises(fio.FioError, match="engine:depth:block"):
        fio.Config.parse("psync:0:4m")
    command = fio.command(fio.Config.parse("psync:4:1m"), tmp_path / "f", 8 << 20)
    assert {"--direct=1", "--end_fsync=1", "--fallocate=native", "--numjobs=4", f"--size={2 << 20}"} <= {*command}
    if not shutil.which("fio"):
        pytest.skip("fio is not installed")
    for text in ("psync:2:1m", "io_uring:2:1m"):
        try:
            rate = fio.run(fio.Config.parse(text), tmp_path / "f", 4 << 20)
        except fio.FioError as error:
            assert str(error)  # no direct I/O here, or no io_uring: it must say why
        else:
            assert rate > 0
        assert not (tmp_path / "f").exists()


def test_fio_reads_a_file_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.measure import fio

    config = fio.Config.parse("psync:2:1m")
    command = fio.read_command(config, tmp_path / "f", 8 << 20)
    assert {"--direct=1", "--rw=read", "--numjobs=2", f"--size={4 << 20}"} <= {*command}
    assert "--rw=write" not in command
    if not shutil.which("fio"):
        pytest.skip("fio is not installed")
    try:
        assert fio.run_read(config, tmp_path / "f", 4 << 20) > 0
    except fio.FioError as error:
        assert str(error)  # no direct I/O here: it must say so
    assert (tmp_path / "f").stat().st_size == 4 << 20


def test_our_colour_is_the_same_in_every_picture() -> None:
    pytest.importorskip("matplotlib")
    from bench.measure.picture_style import COLOURS, OUR_COLOUR, colour_of, styles

    sides = ["torch.save + fsync", "ckpt, own files", "ckpt_like", "ckpt", *(f"rival {number}" for number in range(20))]
    colours = {name: colour for name, colour, _ in styles(sides)}
    assert [name for name, colour in colours.items() if colour == OUR_COLOUR] == ["ckpt, own files", "ckpt"]
    assert OUR_COLOUR not in COLOURS
    assert len({colour_of(name) for name in ("ckpt", "ckpt, buffered", "safetensors")}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("workload", ["deepspeed", "sharded"])
def test_a_program_that_is_asked_to_end_ends_its_ranks(workload: str, apart: bool, tmp_path: Path) -> None:
    """And removes what it has written; also where each workload has a process of its own."""
    if workload == "deepspeed" and importlib.util.find_spec(workload) is None:
        pytest.skip(f"{workload} is not installed")
    files = tmp_path / "files"
    more = ["--workload=metrics"] if apart else []
    command = [sys.executable, "-m", "bench.run", *TINY, f"--directory={files}", f"--workload={workload}", *more]
    program = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def others() -> list[psutil.Process]:
        return psutil.Process(program.pid).children(recursive=True)

    def there_are_ranks() -> bool:
        """Two processes of the same command: where they are forked, they are of that of their parent."""
        with contextlib.suppress(psutil.NoSuchProcess):
            commands = [tuple(each.cmdline()) for each in others()]
            return any(commands.count(each) >= 2 for each in commands if "-m" in each)
        return False

    try:
        wait_until(there_are_ranks, DEADLINE_S)
        started = others()
    finally:
        program.terminate()
        status = program.wait(DEADLINE_S)
    assert status == 128 + signal.SIGTERM
    _, alive = psutil.wait_procs(started, DEADLINE_S)
    assert alive == []
    assert os.listdir(files) == []
