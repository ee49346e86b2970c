"""What `make gpu` makes of its steps: each gets its turn whatever becomes of the others, and the page says what is so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from places import ROOT
from support import patience, wait_until

from bench.gpu_report.findings import FAIL, INCONCLUSIVE, NOT_RUN, PASS, SKIPPED, Findings, read
from bench.gpu_report.page import BARS, make_page
from bench.gpu_report.plan import DEVICE_TESTS, Planner, proxy_is_there
from bench.gpu_report.run import NO_GPU, Results, run
from bench.gpu_report.runner import Outcome, Runner, Step
from bench.gpu_report.sizes import STATE_BYTES, Size, choose
from bench.measure.report import Bar, Report
from bench.measure.sampling import Sample

DEADLINE_S = patience(60.0)
HANG_S = patience(3.0)  # in which a step surely has begun, and written what it does before it hangs
COMMON: dict[str, Any] = {
    "date": "2027-01-02T03:04:05+00:00",
    "commit": "abc",
    "uncommitted_changes": False,
    "machine": {"cpu": "a processor", "kernel": "6"},
    "versions": {"ckpt": "9.9", "native_build": "dev", "python": "3.11"},
}
ROOMY = {
    "gpu_free_bytes": 140e9,
    "memory_available_bytes": 500e9,
    "cgroup_memory_bytes": None,
    "disk_free_bytes": 1e12,
    "disk_write_GBps": 6.0,
}
FULL = Size(1.0, 2, {"rate": 1.0})


def step(name: str, program: str, limit_s: float = DEADLINE_S, **fields: Any) -> Step:
    """A program that has `out` and `directory`, and whose last lines these are."""
    head = "import os, sys, time, json, subprocess\nfrom pathlib import Path\nout, directory = map(Path, sys.argv[1:])\n"
    return Step(name, [sys.executable, "-c", head + textwrap.dedent(program), "{out}", "{directory}"], limit_s, **fields)


def found(verdict: str = PASS, check: str = "c", reason: str = "") -> str:
    line = {"check": check, "verdict": verdict, "reason": reason, "figures": {}}
    return f"open(out, 'a').write(json.dumps({line!r}) + '\\n')"


@pytest.fixture
def heard() -> list[Outcome]:
    return []


@pytest.fixture
def runner(tmp_path: Path, heard: list[Outcome]) -> Runner:
    return Runner(tmp_path / "place", ROOT, 10 * DEADLINE_S, heard.append)


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


# ---- the runner ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_steps_have_their_turn_whatever_becomes_of_others(runner: Runner, heard: list[Outcome]) -> None:
    steps = [
        step("raises", "raise SystemExit('on purpose')"),
        step("is killed", f"{found()}; os.kill(os.getpid(), 9)"),
        step("hangs", f"{found(FAIL, 'half', 'bad')}; time.sleep(3600)", limit_s=HANG_S),
        step("is slow", f"{found()}; time.sleep(3600)", limit_s=HANG_S, late=INCONCLUSIVE),
        step("is not to be run", "raise SystemExit(1)", skip="there is no such tool"),
        step("says nothing", "print('hello')"),
        step("does not start", ""),
        step("passes", found()),
    ]
    steps[6] = Step("does not start", ["/nonexistent/program"], DEADLINE_S)
    for each in steps:
        runner.run(each)
    assert [(outcome.step.name, outcome.verdict) for outcome in heard] == [
        ("raises", FAIL),
        ("is killed", FAIL),
        ("hangs", FAIL),
        ("is slow", INCONCLUSIVE),
        ("is not to be run", SKIPPED),
        ("says nothing", FAIL),
        ("does not start", FAIL),
        ("passes", PASS),
    ]
    reasons = {outcome.step.name: outcome.reason for outcome in heard}
    assert reasons["raises"] == "it ended with exit status 1" and "on purpose" in heard[0].said
    assert reasons["is killed"] == "it ended with signal 9" and len(heard[1].findings) == 1
    assert reasons["hangs"] == f"it had not ended after {HANG_S:.0f} s; half: bad"
    assert reasons["is slow"] == f"it had not ended after {HANG_S:.0f} s" and len(heard[3].findings) == 1
    assert reasons["is not to be run"] == "there is no such tool"
    assert reasons["says nothing"] == "it has written nothing" and heard[5].said == "hello"
    assert reasons["passes"] == ""


def test_what_a_step_has_started_ends_with_it(runner: Runner, tmp_path: Path) -> None:
    program = f"""
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
        Path({str(tmp_path / "pid")!r}).write_text(str(child.pid))
        {found()}
        time.sleep(SECONDS)
    """
    for sleep, verdict in ((0, PASS), (3600, FAIL)):
        (tmp_path / "pid").unlink(missing_ok=True)  # that of the step before would have ended whatever becomes of this one
        outcome = runner.run(
            step("starts another", program.replace("SECONDS", str(sleep)), limit_s=HANG_S if sleep else DEADLINE_S)
        )
        assert outcome.verdict == verdict
        pid = int((tmp_path / "pid").read_text())
        wait_until(lambda pid=pid: has_ended(pid), what="the end of what the step has started")


def test_the_budget_is_kept(tmp_path: Path, heard: list[Outcome]) -> None:
    runner = Runner(tmp_path / "place", ROOT, 3.0, heard.append)
    began = time.monotonic()
    runner.run(step("takes all", f"{found()}; time.sleep(3600)", least_s=0.0))
    runner.run(step("comes late", found(), least_s=1.0))
    runner.run(step("is skipped anyway", found(), skip="no tool"))
    assert time.monotonic() - began < DEADLINE_S
    assert [outcome.verdict for outcome in heard] == [INCONCLUSIVE, NOT_RUN, SKIPPED]
    assert "when the time for all was over" in heard[0].reason and not heard[1].findings
    assert heard[1].reason.endswith("s of the time for all were left, and it needs 1 s")


def test_the_worst_finding_is_that_of_the_step(runner: Runner) -> None:
    def verdict_of(*verdicts: str) -> tuple[str, str]:
        outcome = runner.run(step("s", "\n".join(found(each, each, "because") for each in verdicts)))
        return outcome.verdict, outcome.reason

    assert verdict_of(PASS, SKIPPED) == (PASS, "")
    assert verdict_of(SKIPPED) == (SKIPPED, "because")
    assert verdict_of(PASS, INCONCLUSIVE) == (INCONCLUSIVE, "inconclusive: because")
    assert verdict_of(INCONCLUSIVE, FAIL, PASS) == (FAIL, "inconclusive: because; fail: because")


def test_steps_leave_no_files(runner: Runner, tmp_path: Path) -> None:
    outcome = runner.run(step("writes", f"(directory / 'large').write_text('x'); {found()}"))
    assert outcome.verdict == PASS
    assert [path.suffix for path in (tmp_path / "place").iterdir() if path.is_dir()] == []


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    findings = Findings(tmp_path / "out")
    findings.add("whole", PASS, seen_bytes=3)
    with (tmp_path / "out").open("a") as file:
        file.write('{"check": "ha')
    assert [line["check"] for line in read(tmp_path / "out")] == ["whole"]
    assert read(tmp_path / "none") == []


def test_an_error_is_a_finding(tmp_path: Path) -> None:
    findings = Findings(tmp_path / "out")
    with findings.guard("one"):
        raise ValueError("on purpose")
    with findings.guard("two"):
        findings.add("two", PASS)
    lines = read(tmp_path / "out")
    assert [(line["check"], line["verdict"]) for line in lines] == [("one", FAIL), ("two", PASS)]
    assert lines[0]["reason"] == "ValueError: on purpose"


# ---- sizes -----------------------------------------------------------------------------------------------------------


def test_a_roomy_machine_is_measured_at_full_size() -> None:
    size = choose(ROOMY, 800.0)
    assert size.scale == 1.0 and size.why == "" and list(size.seconds) == ["rate", "blocked", "iterations", "restore"]
    assert sum(size.seconds.values()) <= 800.0
    assert 1 == choose(ROOMY, 500.0).rounds < size.rounds < choose(ROOMY, 4000.0).rounds


@pytest.mark.parametrize(
    ("lack", "why"),
    [
        ({"gpu_free_bytes": 20e9}, "memory of the GPU"),
        ({"memory_available_bytes": 30e9}, "memory of the host"),
        ({"cgroup_memory_bytes": 30e9}, "memory of the host"),
        ({"disk_free_bytes": 10e9}, "room on the disk"),
        ({"disk_write_GBps": 0.5}, "the disk writes 0.5 GB/s"),
    ],
)
def test_what_is_scarce_makes_it_smaller(lack: dict[str, Any], why: str) -> None:
    size = choose(ROOMY | lack, 800.0)
    assert 0 < size.scale < 1 and why in size.why
    assert 3.5 * size.scale * STATE_BYTES <= (ROOMY | lack)["disk_free_bytes"]


def test_without_facts_or_time_it_is_as_small_as_can_be() -> None:
    assert choose({}, 1000.0).scale == choose(ROOMY, 0.0).scale == 0.002
    assert choose({}, 1000.0).why == "it is not known how much memory of the GPU there is"


# ---- the page --------------------------------------------------------------------------------------------------------


def benchmark_lines(**values: float) -> list[dict[str, Any]]:
    """As bench.run writes them: all that have a bar, met but for what is given."""
    report = Report({}, 1.0)
    for judged in BARS:
        relation, limit = judged.bar.removesuffix(" s").split()
        value = values.get(judged.title, float(limit))
        samples = [Sample(0.0, {judged.quantity: value})]
        unit = "s" if judged.bar.endswith(" s") else "1"
        report.add("gpu", judged.case, unit, samples, nbytes=1, how="-", bar=Bar(relation, float(limit)))
    return report.lines


def page_of(outcomes: list[Outcome], size: Size | None = FULL, stand_in: bool = False) -> str:
    return make_page(COMMON, outcomes, size, "2027-01-02-gpu.jsonl", stand_in)


def rows(page: str, heading: str) -> dict[str, list[str]]:
    """Of the table below a heading: by the first cell the others."""
    body = page.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line.strip("| ").split(" | ") for line in body.splitlines() if line.startswith("|")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines[2:]}


def test_a_page_says_what_became_of_each_step() -> None:
    outcomes = [
        Outcome(Step("first", [], 1), PASS, seconds=3.0, lines=[{"check": "facts", "verdict": PASS, "figures": {"gpu": "G"}}]),
        Outcome(Step("second", [], 1), FAIL, "a | b\nc", 4.0, said="last words\n```"),
        Outcome(Step("third", [], 1), SKIPPED, "no tool"),
        Outcome(Step("fourth", [], 1), NOT_RUN, "0 s were left"),
        Outcome(Step("fifth", [], 1), INCONCLUSIVE, "few samples", 1.0),
    ]
    page = page_of(outcomes)
    assert page.startswith("# lazyckpt 9.9 on a GPU, 2027-01-02\n")
    assert "Steps: 1 pass, 1 fail, 1 inconclusive, 1 skipped, 1 not run. Bars: 9 not run." in page
    table = rows(page, "Checks")
    assert [cells[0] for cells in table.values()] == [PASS, FAIL, SKIPPED, NOT_RUN, INCONCLUSIVE]
    assert table["third"][-1] == "no tool" and table["fourth"][-1] == "0 s were left"
    assert "a \\| b c" in page, "a cell is one line"
    assert rows(page, "Machine")["gpu"] == ["G"] and rows(page, "Machine")["commit"] == ["abc"]
    assert "### Said by: second\n\n```text\nlast words\n'''\n```" in page
    assert "`2027-01-02-gpu.jsonl`" in page and "stood in" not in page
    assert "stood in" in page_of(outcomes, stand_in=True)


def test_a_page_has_figures_beside_their_bars() -> None:
    missed = {"host time of save() + fence": 0.0071, "iteration with a save / without": 1.0199}
    page = page_of([Outcome(Step("benchmark", [], 1), PASS, lines=benchmark_lines(**missed))])
    table = rows(page, "Figures against their bars")
    assert table["host time of save() + fence"][:3] == ["0.0071 s", "<= 0.005 s", FAIL]
    assert table["iteration with a save / without"][:3] == ["1.02", "<= 1.02", PASS]
    assert f"Bars: {len(BARS) - 1} pass, 1 fail." in page
    assert "Full size: 1 billion parameters" in page


def test_at_a_smaller_size_no_bar_is_judged() -> None:
    lines = [line | {"passed": None} for line in benchmark_lines()]
    page = page_of([Outcome(Step("b", [], 1), PASS, lines=lines)], Size(0.25, 1, {}, "the disk is slow"))
    assert {cells[2] for cells in rows(page, "Figures against their bars").values()} == {INCONCLUSIVE}
    assert "not judged: scale 0.25" in page and "the disk is slow" in page


def test_a_rival_that_does_not_run_is_named_with_its_reason() -> None:
    report = Report({}, 1.0)
    report.add("gpu", "DCP async_save", "1", [Sample(0.0, {"runs_here": 0.0})], nbytes=1, how="-", error="no shared memory")
    table = rows(page_of([Outcome(Step("b", [], 1), PASS, lines=report.lines)]), "Figures against their bars")
    assert table["blocked: ckpt / DCP async_save"][2] == NOT_RUN
    assert table["blocked: ckpt / DCP async_save"][-1] == "no shared memory"


def test_bars_are_those_of_the_benchmark() -> None:
    """The page knows them by the names that the benchmark gives."""
    from bench.gpu import blocked, iterations, restore, rivals, setup, workload

    expected = {
        "ckpt / pinned limit": workload.BAR,
        "ckpt": blocked.HOST_BAR,
        "ckpt every iteration / no saving": iterations.BAR,
    }
    expected |= {f"{name} / min(disk, link)": restore.BAR for name in (restore.OURS, restore.INTO)}
    device: Any = type("Device", (), {"stand_in": True})()
    names = [
        rival.name for rival in rivals.make_rivals(device, 1, Path("/dev/shm/none")) if rival.name.startswith(rivals.DCP_ASYNC)
    ]
    expected |= {f"ckpt / {name}, blocked": blocked.BLOCKED_BAR for name in names}
    assert {judged.case: judged.bar.removesuffix(" s") for judged in BARS} == {case: str(bar) for case, bar in expected.items()}
    assert setup.OURS == "ckpt" and setup.DEFAULT_ARENA == "ckpt, default arena"


# ---- the whole -------------------------------------------------------------------------------------------------------


class Plan(Planner):
    """Steps that take no time."""

    def facts(self) -> Step:
        return step("facts", found().replace("'figures': {}", f"'figures': {ROOMY!r}").replace("'c'", "'facts'"))

    def checks(self) -> list[Step]:
        return [step("good", found()), step("bad", "sys.exit(3)")]

    def benchmarks(self, size: Size) -> list[Step]:
        return [step("benchmark", f"out.write_text({json.dumps(benchmark_lines()[0] | COMMON)!r})")]


def test_a_run_leaves_a_page_and_all_lines(tmp_path: Path) -> None:
    for suffix in ("", "-2"):  # a second run keeps what the first has found
        results = Results(tmp_path / "results", COMMON, stand_in=False)
        run(Plan(), Runner(tmp_path / f"place{suffix}", ROOT, 10 * DEADLINE_S, results.hear), results, only="")
        name = f"2027-01-02-gpu{suffix}"
        assert (results.page.name, results.lines.name) == (f"{name}.md", f"{name}.jsonl")
        lines = [json.loads(text) for text in results.lines.read_text().splitlines()]
        assert all(line["date"] == COMMON["date"] and line["commit"] == "abc" and line["step"] for line in lines)
        verdicts = {line["step"]: line["verdict"] for line in lines if "seconds" in line}
        assert verdicts == {"facts": PASS, "good": PASS, "bad": FAIL, "benchmark": PASS}
        assert [line["case"] for line in lines if "case" in line] == [BARS[0].case]
        assert results.size is not None and results.size.scale == 1.0
        assert rows(results.page.read_text(), "Checks")["bad"][0] == FAIL


def test_a_run_that_is_interrupted_leaves_what_it_has_found(tmp_path: Path) -> None:
    class Interrupted(Plan):
        def benchmarks(self, size: Size) -> list[Step]:
            raise KeyboardInterrupt

    results = Results(tmp_path, COMMON, stand_in=False)
    with pytest.raises(KeyboardInterrupt):
        run(Interrupted(), Runner(tmp_path / "place", ROOT, 10 * DEADLINE_S, results.hear), results, only="good")
    assert list(rows(results.page.read_text(), "Checks")) == ["facts", "good"]


def test_the_steps_are_all_there_and_in_order() -> None:
    names = [each.name for each in [Planner().facts(), *Planner().checks(), *Planner().benchmarks(choose(ROOMY, 900.0))]]
    wanted = ["facts", "check_devices", "device tests", "every call of the driver", "memcheck", "initcheck"]
    wanted += ["cudaMallocAsync", "expandable", "captured", "latency", "full device"]
    wanted += ["benchmark: rate", "benchmark: blocked", "benchmark: iterations", "benchmark: restore"]
    assert len(names) == len(wanted) and all(part in name for part, name in zip(wanted, names, strict=True))


def test_the_checking_driver_is_used_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / DEVICE_TESTS).parent.mkdir(parents=True)
    (tmp_path / DEVICE_TESTS).write_text("import pytest\n")
    assert not proxy_is_there(tmp_path) and proxy_is_there(ROOT)
    for there in (True, False):
        monkeypatch.setattr("bench.gpu_report.plan.proxy_is_there", lambda root, there=there: there)
        (again,) = (each for each in Planner().checks() if "every call" in each.name)
        assert again.environment["LAZYCKPT_TEST_DRIVER"] == "proxy"
        assert bool(again.skip) is not there
    (again,) = (each for each in Planner(tmp_path).checks() if "every call" in each.name)
    assert "host memory" in again.skip, "torch would call no driver there, and the proxy would see nothing"


def test_without_a_gpu_one_sentence_says_so(tmp_path: Path) -> None:
    environment = os.environ | {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):  # of a make that runs the tests
        environment.pop(name, None)
    if subprocess.run(["which", "nvidia-smi"], env=environment, capture_output=True).returncode == 0:
        pytest.skip("there is a GPU here")
    command = [sys.executable, "-m", "bench.gpu_report.run", "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)
    assert (done.returncode, done.stderr, os.listdir(tmp_path)) == (2, f"{NO_GPU}\n", [])
    made = subprocess.run(["make", "gpu"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)
    assert made.returncode == 2 and made.stdout == ""
    assert len(made.stderr.splitlines()) == 1 and NO_GPU.removesuffix(".") in made.stderr


def test_with_a_gpu_the_environment_is_one_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["make", "-n", "gpu", "TORCH_INDEX=https://example.org/whl", "ARGS=--budget-s 60"]
    made = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)
    assert made.returncode == 0, made.stderr
    assert ".venv-gpu/bin/python -m bench.gpu_report.run --budget-s 60" in made.stdout
    assert "--extra-index-url https://example.org/whl torch==" in made.stdout
    assert ".venv/" not in made.stdout and "deepspeed" not in made.stdout
