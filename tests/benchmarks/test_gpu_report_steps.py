"""The steps of `make gpu`, where there is no GPU: a fake driver and host memory show that their programs work."""

from __future__ import annotations

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
from places import ROOT
from support import patience

import ckpt
from bench.gpu_report.findings import FAIL, INCONCLUSIVE, PASS, SKIPPED, Findings, read
from bench.gpu_report.plan import ALLOCATORS, DEVICE_TESTS
from bench.gpu_report.steps import facts, full_memory, latency, sanitized, save_and_restore

DEADLINE_S = patience(120.0)
MIB = 1 << 20

__all__ = ["fake_library"]

SMI = """<?xml version="1.0" ?>
<nvidia_smi_log>
  <driver_version>580.65.06</driver_version><cuda_version>13.0</cuda_version>
  <gpu id="00000000:3B:00.0">
    <product_name>NVIDIA GH200 480GB</product_name><uuid>GPU-1</uuid>
    <mig_mode><current_mig>Disabled</current_mig></mig_mode><c2c_mode>Enabled</c2c_mode>
    <pci>
      <pci_bus_id>00000000:3B:00.0</pci_bus_id>
      <pci_gpu_link_info>
        <pcie_gen><max_link_gen>5</max_link_gen><current_link_gen>4</current_link_gen></pcie_gen>
        <link_widths><max_link_width>16x</max_link_width><current_link_width>8x</current_link_width></link_widths>
      </pci_gpu_link_info>
    </pci>
    <ecc_mode><current_ecc>N/A</current_ecc></ecc_mode>
  </gpu>
</nvidia_smi_log>
"""
# As compute-sanitizer: writes a log, runs the program, and ends as it does, or with the status that it was given for errors.
SANITIZER = """#!{python}
import subprocess, sys
words = sys.argv[1:]
log, status = (words[words.index(name) + 1] for name in ("--log-file", "--error-exitcode"))
ended = subprocess.run(words[words.index("no") + 1:]).returncode
open(log, "w").write("========= COMPUTE-SANITIZER\\n========= ERROR SUMMARY: {errors} errors\\n")
sys.exit(int(status) if {errors} else ended)
"""


def tool(directory: Path, name: str, text: str) -> None:
    path = directory / name
    path.write_text(text)
    path.chmod(0o755)


def run_step(program: str, directory: Path, library: Path, *more: str, **environment: str) -> list[dict[str, Any]]:
    place, out = directory / "place", directory / "out"
    place.mkdir()
    command = [sys.executable, "-m", f"bench.gpu_report.steps.{program}", "--out", str(out), "--directory", str(place)]
    done = subprocess.run(
        [*command, "--pretend-cuda", str(library), *more], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True, text=True, timeout=DEADLINE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return read(out)


def verdicts(lines: list[dict[str, Any]]) -> dict[str, str]:
    return {line["check"]: line["verdict"] for line in lines}


# ---- each program on the fake driver ---------------------------------------------------------------------------------


def test_facts(tmp_path: Path, fake_library: Path) -> None:
    tool(tmp_path, "nvidia-smi", f"#!/bin/sh\ncat <<'END'\n{SMI}\nEND\n")
    (line,) = run_step("facts", tmp_path, fake_library, PATH=f"{tmp_path}:{os.environ['PATH']}")
    found = line["figures"]
    assert (line["verdict"], line["reason"]) == (PASS, "")
    assert (found["driver"], found["driver_cuda"], found["gpus_in_machine"]) == ("580.65.06", "13.0", 1)
    assert (found["pcie_generation_now"], found["pcie_width_most"], found["nvlink_c2c"]) == ("4", "16x", "Enabled")
    assert found["mig_mode"] == "Disabled" and "ecc" not in found and "gpu_numa_node" in found
    assert found["torch"] == torch.__version__ and found["stand_in"] is True
    assert 0 < found["memory_available_bytes"] <= found["memory_bytes"] and found["disk_write_GBps"] > 0
    assert os.listdir(tmp_path / "place") == []


def test_facts_that_are_missing_are_named(tmp_path: Path, fake_library: Path) -> None:
    tool(tmp_path, "nvidia-smi", "#!/bin/sh\nexit 9\n")
    (line,) = run_step("facts", tmp_path, fake_library, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert line["verdict"] == INCONCLUSIVE and line["reason"].startswith("nvidia-smi: CalledProcessError")
    assert line["figures"]["disk_write_GBps"] > 0


def test_check_of_devices(tmp_path: Path, fake_library: Path) -> None:
    assert verdicts(run_step("device_check", tmp_path, fake_library)) == {"device 0": PASS}


def test_the_short_program(tmp_path: Path, fake_library: Path) -> None:
    lines = run_step("save_and_restore", tmp_path, fake_library, "--allocator", "cudaMallocAsync")
    arenas = {line["check"]: line["figures"]["saves"] for line in lines if line["check"] in save_and_restore.ARENAS}
    assert arenas == dict.fromkeys(save_and_restore.ARENAS, save_and_restore.SAVES)
    assert verdicts(lines) == dict.fromkeys(arenas, PASS) | {"torch allocates by cudaMallocAsync": INCONCLUSIVE}


def test_a_capture_elsewhere(tmp_path: Path, fake_library: Path) -> None:
    (line,) = run_step("captured_elsewhere", tmp_path, fake_library)
    assert line["verdict"] in (PASS, INCONCLUSIVE)
    assert (line["figures"]["captures_during_copies"] > 0) is (line["verdict"] == PASS)


@pytest.mark.slow
def test_latency(tmp_path: Path, fake_library: Path) -> None:
    lines = run_step("latency", tmp_path, fake_library, "--seconds", "2")
    assert [line["check"] for line in lines] == [latency.ITEM, latency.REDUCE]
    for line in lines:
        assert line["verdict"] in (PASS, INCONCLUSIVE) and line["figures"]["samples_alone"] > 0
    assert lines[1]["figures"]["backend"] == "gloo"


@pytest.mark.slow
def test_training_with_a_full_device(tmp_path: Path, fake_library: Path) -> None:
    lines = run_step("full_memory", tmp_path, fake_library, "--seconds", "2")
    assert [line["check"] for line in lines] == list(full_memory.WAYS.values())
    for line in lines:
        assert line["verdict"] in (PASS, INCONCLUSIVE) and line["figures"]["out_of_memory"] == 0
        assert line["figures"]["ballast_bytes"] > 0 and line["figures"]["iterations"] >= 2


@pytest.mark.slow
@pytest.mark.parametrize(("errors", "verdict"), [(0, PASS), (2, FAIL)])
def test_under_the_sanitizer(errors: int, verdict: str, tmp_path: Path, fake_library: Path) -> None:
    tool(tmp_path, "compute-sanitizer", SANITIZER.format(python=sys.executable, errors=errors))
    path = f"{tmp_path}:{os.environ['PATH']}"
    lines = run_step("sanitized", tmp_path, fake_library, "--tool", "memcheck", PATH=path)
    assert lines[0] == lines[0] | {"check": "memcheck", "verdict": verdict, "figures": {"errors": errors}}
    assert verdicts(lines[1:]) == {f"{name}, under memcheck": PASS for name in save_and_restore.ARENAS}


def test_the_device_suite(tmp_path: Path, fake_library: Path) -> None:
    lines = run_step("device_suite", tmp_path, fake_library, "--only", "kinds or full", LAZYCKPT_TEST_DEVICE="cpu")
    assert verdicts(lines) == {
        "test_all_kinds_of_tensors[False]": PASS,
        "test_all_kinds_of_tensors[True]": PASS,
        "test_a_full_device": SKIPPED,
    }


@pytest.mark.slow
def test_all_of_it(tmp_path: Path, fake_library: Path) -> None:
    """As `make gpu` does it, at the smallest size."""
    tool(tmp_path, "nvidia-smi", f"#!/bin/sh\ncat <<'END'\n{SMI}\nEND\n")
    tool(tmp_path, "compute-sanitizer", SANITIZER.format(python=sys.executable, errors=0))
    command = [
        sys.executable,
        "-m",
        "bench.gpu_report.run",
        f"--pretend-cuda={fake_library}",
        f"--directory={tmp_path / 'place'}",
    ]
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, f"--results={tmp_path / 'results'}"], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=4 * DEADLINE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (lines_path, page_path) = sorted((tmp_path / "results").iterdir())
    assert (lines_path.suffix, page_path.suffix) == (".jsonl", ".md") and lines_path.stem.endswith("-gpu-stand-in")
    lines = [json.loads(text) for text in lines_path.read_text().splitlines()]
    steps = {line["step"]: line["verdict"] for line in lines if "seconds" in line}
    skipped = [name for name, verdict in steps.items() if verdict == SKIPPED]
    assert all("every call of the driver" in name for name in skipped)
    assert set(steps.values()) <= {PASS, INCONCLUSIVE, SKIPPED} and len(steps) == 15
    assert {line["passed"] for line in lines if "passed" in line} == {None}, "a stand-in reaches no bar"
    page = page_path.read_text()
    assert "580.65.06" in page and "stood in" in page and "not measured" not in page
    assert os.listdir(tmp_path / "place") == []


def test_the_short_program_finds_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device: Any = SimpleNamespace(torch_device=torch.device("cpu"), map_location="cpu", synchronize=lambda: None, stand_in=True)
    weights = torch.zeros(4 * MIB)
    step: Any = SimpleNamespace(state=lambda: {"a": weights}, model=False, forward_backward=int, step=int)
    assert save_and_restore.save_every_iteration(step, device, tmp_path / "good", 8 * MIB) == save_and_restore.SAVES
    with pytest.raises(AssertionError, match="tensor 0, loaded to the device, is not what it was"):
        save_and_restore.check_loaded({"a": weights + 1}, [weights])
    save = ckpt.save
    monkeypatch.setattr(ckpt, "save", lambda state, *rest, **how: save({"a": state["a"] + 1}, *rest, **how))
    with pytest.raises(AssertionError, match=r"tensor 0 of .* is not what it was when it was saved"):
        save_and_restore.save_every_iteration(step, device, tmp_path / "bad", 8 * MIB)


# ---- what they make of what they see ---------------------------------------------------------------------------------


def test_a_sanitizer_that_does_not_work_is_no_error_of_ours(tmp_path: Path) -> None:
    cases = {
        "Internal error: no device": (1, INCONCLUSIVE),
        "ERROR SUMMARY: 0 errors": (1, FAIL),
        "ERROR SUMMARY: 1 error": (0, FAIL),
    }
    for number, (text, (status, _)) in enumerate(cases.items()):
        (tmp_path / f"{number}.log").write_text(text)
        sanitized.report(Findings(tmp_path / "out"), f"tool {number}", status, tmp_path / f"{number}.log")
    assert list(verdicts(read(tmp_path / "out")).values()) == [verdict for _, verdict in cases.values()]


def test_memory_is_judged_by_the_training_alone() -> None:
    alone = {"out_of_memory": 0, "device_growth_bytes": 0, "host_growth_bytes": 5 * MIB, "iterations": 50}

    def judged(**changes: Any) -> str:
        return full_memory.judge("saves", alone | changes, alone)[0]

    assert judged() == PASS
    assert judged(out_of_memory=1) == FAIL
    assert judged(device_growth_bytes=65 * MIB) == FAIL
    assert judged(host_growth_bytes=140 * MIB) == FAIL and judged(host_growth_bytes=130 * MIB) == PASS
    assert judged(device_growth_bytes=None, host_growth_bytes=None) == INCONCLUSIVE
    both = {"out_of_memory": 2}
    assert full_memory.judge("saves", alone | both, alone | both)[0] == INCONCLUSIVE


def test_allocations_that_fail_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    device: Any = SimpleNamespace(stand_in=True, torch_device=torch.device("cpu"), synchronize=lambda: None)
    ballast = full_memory.Ballast(device, 200 * MIB)
    assert ballast.nbytes == 128 * MIB, "pieces of 2 MiB"
    ballast.in_and_out()
    assert ballast.failures == 0
    real, taken = torch.empty, []

    def scarce(nbytes: int, **how: Any) -> torch.Tensor:
        taken.append(nbytes)
        if len(taken) == 5:
            raise torch.OutOfMemoryError("on purpose")
        return real(nbytes, **how)

    monkeypatch.setattr(torch, "empty", scarce)
    ballast.in_and_out()
    assert (ballast.failures, len(taken)) == (1, 5)


def test_facts_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="a GPU", major=9, minor=0, uuid="u")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (70, 80))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = facts.of_torch()
    assert (found["gpu"], found["compute_capability"], found["gpus"]) == ("a GPU", "9.0", 2)
    assert (found["gpu_free_bytes"], found["gpu_memory_bytes"]) == (70, 80)


@pytest.mark.parametrize("backend", ["cudaMallocAsync", "native"])
def test_an_allocator_that_torch_has_not_taken_proves_nothing(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: backend)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: [{"is_expandable": backend != "native"}])
    device: Any = SimpleNamespace(stand_in=False)
    for wanted in ALLOCATORS.values():
        save_and_restore.check_allocator(Findings(tmp_path / "out"), wanted, device)
    expected = INCONCLUSIVE if backend == "native" else PASS
    assert list(verdicts(read(tmp_path / "out")).values()) == [expected] * 2


def test_growth_is_seen_between_quarters() -> None:
    assert full_memory.growth([1, 2]) is None
    assert full_memory.growth([900, 10, 10, 10, 10, 10, 10, 10]) == 0, "the first ones warm up"
    assert full_memory.growth([0, 0, 10, 10, 20, 20, 30, 30]) == 20


def test_too_few_samples_say_nothing(tmp_path: Path) -> None:
    findings = Findings(tmp_path / "out")
    latency.compare(findings, "few", [1e-5] * 9, [2e-5] * (latency.FEWEST - 1))
    latency.compare(findings, "none", [1e-5] * 9, [])
    latency.compare(findings, "enough", [1e-5] * 9, [2e-5] * latency.FEWEST)
    lines = read(tmp_path / "out")
    assert verdicts(lines) == {"few": INCONCLUSIVE, "none": INCONCLUSIVE, "enough": PASS}
    assert lines[2]["figures"]["median_ratio"] == lines[2]["figures"]["p99_ratio"] == 2.0
    assert latency.p99(list(range(200))) == 197


def test_a_failed_test_of_the_suite_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_a():\n    assert 1 == 2\ndef test_b():\n    pass\n")
    program = (
        "import sys, pathlib, pytest\n"
        "from bench.gpu_report.findings import Findings\n"
        "from bench.gpu_report.steps.device_suite import Recorder\n"
        "pytest.main([sys.argv[1], '-q', '-p', 'no:cacheprovider'], plugins=[Recorder(Findings(pathlib.Path(sys.argv[2])))])\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "test_it.py"), str(tmp_path / "out")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=DEADLINE_S)
    lines = read(tmp_path / "out")
    assert verdicts(lines) == {"test_a": FAIL, "test_b": PASS} and "assert 1 == 2" in lines[0]["reason"]
    assert (ROOT / DEVICE_TESTS).is_file()


def test_a_device_is_known_by_its_bus(tmp_path: Path) -> None:
    assert facts.numa_node("00000000:FF:1F.9") is None
