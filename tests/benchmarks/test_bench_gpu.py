"""The benchmark of the GPU path, where there is no GPU: a fake driver and host memory show that all of it works.

What is measured so means nothing, and the lines must say that.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_driver import fake_library
from test_bench import DEADLINE_S, ROOT, TINY, Line, check_line, only, run_bench

import ckpt

pytestmark = pytest.mark.slow

__all__ = ["fake_library"]

GPU = "gpu, STAND-IN"
SAVERS = {"ckpt", "ckpt, default arena", "ckpt, small arena", "torch.save + fsync", "DCP save", "DCP async_save"}
ASYNC = (
    "DCP async_save",
    "DCP async_save, thread, pinned, staged in background",
    "DCP async_save, process, pinned",
    "DCP async_save, process, pinned, staged in background",
)
ROUNDS = 2

# As an engine that works once, and then ends the program where it should raise.
BROKEN_ENGINE = """
import sys
import torch

class CheckpointEngine:
    def __init__(self, config, rank):
        assert config["host_cache_size"] >= 1
        self.saves = 0

    def save(self, state, path):
        self.saves += 1
        if self.saves > 1:
            sys.exit(-1)
        torch.save(state, path)

    def wait(self, persist=False):
        pass
"""


def run_gpu(directory: Path, library: Path, *arguments: str) -> tuple[list[Line], str]:
    return run_bench(directory, "--workload=gpu", "--fio=none", f"--pretend-cuda={library}", *arguments)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench_gpu")


@pytest.fixture(scope="module")
def run(directory: Path, fake_library: Path) -> tuple[list[Line], str]:
    return run_gpu(directory, fake_library, f"--rounds={ROUNDS}")


@pytest.fixture(scope="module")
def lines(run: tuple[list[Line], str]) -> list[Line]:
    return run[0]


def test_every_line_is_complete_and_says_that_it_means_nothing(run: tuple[list[Line], str]) -> None:
    lines, said = run
    for line in lines:
        check_line(line)
        assert line["workload"] == GPU
        assert line["machine"]["gpu"]["stand_in"] is True
        assert line["job"]["parameters"] >= 2_000_000
        assert line["bytes"] == line["job"]["state_bytes"] >= 14 * line["job"]["parameters"]
    names = [(line["case"], line["quantity"]) for line in lines]
    assert len(names) == len(set(names))
    assert "means nothing" in said and GPU in said


def test_every_bar_is_there(lines: list[Line]) -> None:
    ran = {line["case"] for line in lines if line["quantity"] == "blocked_s"}
    expected = {
        ("ckpt / pinned limit", "ratio"): ">= 0.95",
        ("ckpt", "blocked_s"): "<= 0.005",
        ("ckpt every iteration / no saving", "ratio"): "<= 1.02",
        ("ckpt.load / min(disk, link)", "ratio"): ">= 0.9",
        ("ckpt.load_into / min(disk, link)", "ratio"): ">= 0.9",
    }
    expected |= {(f"ckpt / {name}, blocked", "ratio"): "<= 0.05" for name in ASYNC if name in ran}
    assert {(line["case"], line["quantity"]): line["bar"] for line in lines if line["bar"]} == expected


def test_each_way_of_saving_is_measured_or_says_why_not(run: tuple[list[Line], str]) -> None:
    lines, said = run
    blocked = {line["case"]: line for line in lines if line["quantity"] == "blocked_s"}
    missing = {line["case"]: line["detail"]["error"] for line in lines if line["quantity"] == "runs_here"}
    assert blocked.keys() >= SAVERS
    assert blocked.keys() & missing.keys() == set()
    assert set(ASYNC) | {"DataStates"} <= blocked.keys() | missing.keys()
    for case, error in missing.items():
        assert error and f"{case} cannot run here: {error}" in said
    for case, line in blocked.items():
        assert line["n"] == ROUNDS
        if case == "nothing saved" or "early" in case:
            continue
        durable, held = only(lines, GPU, case, "durable_s"), only(lines, GPU, case, "held_s")
        assert all(a > 0 and b > 0 for a, b in zip(durable["samples"], held["samples"], strict=True))
        assert only(lines, GPU, case, "host_peak_MiB")["value"] >= 0


def test_our_saves_come_from_the_device(lines: list[Line]) -> None:
    for case in ("ckpt", "ckpt, small arena"):
        detail = only(lines, GPU, case, "blocked_s")["detail"]
        assert detail["stats_medians"]["bytes_from_devices"] == only(lines, GPU, case, "blocked_s")["bytes"]
        assert detail["stats_medians"]["bytes_copied_in_save"] < only(lines, GPU, case, "blocked_s")["bytes"] / 4, (
            "most is lazy"
        )
        assert detail["first_save_s"] > 0
        assert detail["arena_pinned"] is True
    assert only(lines, GPU, "ckpt, default arena", "blocked_s")["detail"]["arena_bytes"] == ckpt.Options().arena_bytes
    small, full = (only(lines, GPU, case, "blocked_s")["detail"]["arena_bytes"] for case in ("ckpt, small arena", "ckpt"))
    assert small < lines[0]["bytes"] < full
    arena_MiB = full / (1 << 20)
    assert only(lines, GPU, "ckpt", "host_peak_MiB")["value"] >= 0.9 * arena_MiB, "the arena is made in the first save"


def test_ratios_are_those_of_the_medians(lines: list[Line]) -> None:
    pairs = {
        "ckpt / pinned limit": ("ckpt", "pinned limit", "rate_GBps"),
        "ckpt / DCP async_save, blocked": ("ckpt", "DCP async_save", "blocked_s"),
        "ckpt / torch.save + fsync, durable": ("ckpt", "torch.save + fsync", "durable_s"),
        "ckpt every iteration / no saving": ("ckpt every iteration", "no saving", "iteration_s"),
        "ckpt.load / DCP save, load": ("ckpt.load", "DCP save, load", "restore_s"),
    }
    for case, (above, below, quantity) in pairs.items():
        ratio = only(lines, GPU, case, "ratio")
        assert ratio["value"] == only(lines, GPU, above, quantity)["median"] / only(lines, GPU, below, quantity)["median"]


def test_blocks_of_iterations_are_turned_around(lines: list[Line]) -> None:
    names = ("no saving", "ckpt every iteration", "ckpt, small arena every iteration")
    starts = [(at, name) for name in names for at in only(lines, GPU, name, "iteration_s")["started_s"]]
    order = [name for _, name in sorted(starts)]
    assert order == [name for name in (*names, *reversed(names)) for _ in range(3)]
    detail = only(lines, GPU, "ckpt every iteration", "iteration_s")["detail"]
    assert len(detail["flush_s"]) == 3 * ROUNDS and all(flush_s > 0 for flush_s in detail["flush_s"])


def test_nothing_is_left_behind(lines: list[Line], directory: Path) -> None:
    assert lines
    assert os.listdir(directory / "files") == []


def test_a_rival_that_ends_the_program_is_a_result(tmp_path: Path, fake_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "datastates.py").write_text(BROKEN_ENGINE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    lines, said = run_gpu(tmp_path, fake_library, "--parts=blocked", "--rivals=DataStates", "--rounds=1")
    assert only(lines, GPU, "DataStates", "runs_here")["detail"]["error"] == "SystemExit: -1"
    assert "DataStates cannot run here: SystemExit: -1" in said
    assert {line["case"] for line in lines} == {"ckpt", "nothing saved", "DataStates", "ckpt / nothing saved, iteration"}


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    command = [sys.executable, "-m", "bench.run", *TINY, "--workload=gpu", f"--directory={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 1
    assert "gpu failed: RuntimeError: this workload needs an NVIDIA GPU and a torch built for CUDA" in done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("{")] == []


def test_without_fio_the_disk_is_read_by_a_loop(lines: list[Line]) -> None:
    loops = {line["case"]: line["value"] for line in lines if line["case"].startswith("own loop of reads, ")}
    assert len(loops) == 2 and all(rate > 0 for rate in loops.values())
    assert only(lines, GPU, "ckpt.load / min(disk, link)", "ratio")["how"].partition("lower one is ")[2] in {
        *loops,
        "pinned limit, to the device",
    }


# ---- parts -----------------------------------------------------------------------------------------------------------


def test_a_stand_in_judges_no_bar_at_full_size() -> None:
    from bench.measure.report import Bar, Report
    from bench.measure.sampling import Sample

    for judged, passed in ((True, True), (False, None)):
        line = Report({}, 1.0).add(
            "w", "c", "s", [Sample(0.0, {"x": 1.0})], nbytes=1, how="-", bar=Bar("<=", 2.0), judged=judged
        )
        assert (line["bar"], line["passed"]) == ("<= 2", passed)


def test_a_file_that_holds_something_else_is_found(tmp_path: Path) -> None:
    from bench.gpu.setup import check_file, tensors_of

    state = {"a": torch.full((3,), float("nan")), "b": [torch.ones(2, dtype=torch.bfloat16), 7]}
    device: Any = SimpleNamespace(torch_device=torch.device("cpu"))
    ckpt.save(state, tmp_path / "a.pt").result(30)
    check_file(tmp_path / "a.pt", list(tensors_of(state)), device)
    other = [torch.full((3,), float("nan")), torch.tensor([1.0, 2.0], dtype=torch.bfloat16)]
    with pytest.raises(AssertionError, match="tensor 1"):
        check_file(tmp_path / "a.pt", other, device)


def test_the_device_cache_is_measured_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.gpu.setup import Bench

    @dataclasses.dataclass(frozen=True)
    class Cached(ckpt.Options):
        device_cache: int | str = 0

    @dataclasses.dataclass(frozen=True)
    class Bare(ckpt.Options):
        pass

    bench: Any = SimpleNamespace(nbytes=64 << 20, chosen=lambda name: True)
    monkeypatch.setattr(ckpt, "Options", Cached)
    cached: dict[str, Any] = Bench.variants(bench)
    assert [options.size("device_cache") for options in cached.values()] == [0, 0, 0, 32 << 20]
    assert all(options.device_lazy for options in cached.values())
    bench.chosen = lambda name: False
    assert list(Bench.variants(bench)) == ["ckpt"], "which is always measured"


@pytest.mark.parametrize("parameters", [10_000, 2_000_000, 100_000_000, 1_000_000_000, 7_000_000_000])
def test_the_network_has_the_size_that_is_asked_for(parameters: int) -> None:
    from bench.gpu.training import CONTEXT, LARGE, SMALL_CONTEXT, Gpt, shape_for

    shape = shape_for(parameters)
    with torch.device("meta"):
        network = Gpt(shape, CONTEXT if shape.width >= LARGE else SMALL_CONTEXT)
    found = sum(parameter.numel() for parameter in network.parameters())
    layer = 12 * shape.width**2 + 13 * shape.width
    assert parameters <= found <= parameters + 2 * layer


def test_a_part_that_fails_leaves_the_others_their_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.gpu import workload
    from bench.measure.report import Report
    from bench.measure.sampling import Sample, Settings

    def fail(*_: Any) -> None:
        raise AssertionError("the file holds something else")

    def measure(bench: Any, directory: Path, report: Report) -> None:
        report.add("gpu", "c", "s", [Sample(0.0, {"x": 1.0})], nbytes=1, how="-")

    made = SimpleNamespace(stand_in=False, describe=lambda: {"name": "a GPU"})
    monkeypatch.setattr(workload, "find_device", lambda pretended: made)
    monkeypatch.setattr(workload, "Bench", lambda *_: SimpleNamespace(describe_job=lambda: {"parameters": 1}))
    monkeypatch.setattr(workload, "PARTS", {"first": fail, "second": measure})
    report = Report({"machine": {"cpu": "one"}}, 1.0, tmp_path / "out.jsonl")
    with pytest.raises(RuntimeError, match=r"these parts failed: first$"):
        workload.measure_gpu(Settings(tmp_path), report)
    (line,) = (json.loads(text) for text in (tmp_path / "out.jsonl").read_text().splitlines())
    assert line["machine"] == {"cpu": "one", "gpu": {"name": "a GPU"}}
    assert line["job"] == {"parameters": 1}


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    from bench.gpu.workload import measure_gpu
    from bench.measure.report import Report
    from bench.measure.sampling import Settings

    with pytest.raises(ValueError, match=r"no part speed; it has blocked, early, rate"):
        measure_gpu(Settings(tmp_path, parts=("speed",)), Report({}, 1.0))
