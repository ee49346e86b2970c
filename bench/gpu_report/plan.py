"""The steps, in their order: first whether it is right, then how fast it is."""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
from pathlib import Path

from bench.gpu_report.findings import INCONCLUSIVE
from bench.gpu_report.runner import Step
from bench.gpu_report.sizes import Size
from bench.measure.machine import ROOT

STEPS = "bench.gpu_report.steps"
RIVALS = "default arena,torch.save,DCP async_save,DataStates"
FIO = "psync:4:4m,psync:8:8m,io_uring:4:4m,io_uring:8:8m"  # a short look is enough to judge a restore
OVER_EXPECTED, OVER_S = 2.0, 60.0  # a part may take so much longer than it is expected to
ALLOCATORS = {"backend:cudaMallocAsync": "cudaMallocAsync", "expandable_segments:True": "expandable segments"}
DEVICE_TESTS = Path("tests/devices/test_hardware.py")
PROXY = re.compile(r"""["']proxy["']""")  # as one of the drivers that the tests of devices can run on


@dataclasses.dataclass(frozen=True)
class Planner:
    """
    Attributes:
        pretended_cuda: a stand-in for the driver, where all this is tried out without a GPU.
        soak_s: seconds of each way of training with a full device.
        latency_s: of each kind of latency, at most.
    """

    pretended_cuda: Path | None = None
    soak_s: float = 25.0
    latency_s: float = 30.0

    def facts(self) -> Step:
        return self._step("facts", "facts", 60)

    def checks(self) -> list[Step]:
        on_gpu = self.pretended_cuda is None
        suite = {} if on_gpu else {"LAZYCKPT_TEST_DEVICE": "cpu"}
        proxy = "" if proxy_is_there(ROOT) else f"{DEVICE_TESTS} knows no driver `proxy` (LAZYCKPT_TEST_DRIVER)"
        if not on_gpu:
            proxy = "in host memory no driver is called that could be checked"
        sanitizer = "" if shutil.which("compute-sanitizer") else "compute-sanitizer (CUDA toolkit) is not installed"
        steps = [
            self._step("ckpt.check_devices()", "device_check", 60),
            self._step("device tests", "device_suite", 300, environment=suite),
            self._step(
                "device tests, every call of the driver checked", "device_suite", 300,
                environment=suite | {"LAZYCKPT_TEST_DRIVER": "proxy"}, skip=proxy,
            ),
        ]  # fmt: skip
        for tool in ("memcheck", "initcheck"):
            name = f"save and restore under compute-sanitizer, {tool}"
            steps.append(self._step(name, "sanitized", 120, "--tool", tool, skip=sanitizer, late=INCONCLUSIVE))
        for setting, wanted in ALLOCATORS.items():
            environment = {"PYTORCH_CUDA_ALLOC_CONF": setting, "PYTORCH_ALLOC_CONF": setting}
            name = f"save and restore with {setting}"
            steps.append(self._step(name, "save_and_restore", 90, "--allocator", wanted, environment=environment))
        return [
            *steps,
            self._step("a CUDA graph captured beside a save", "captured_elsewhere", 90),
            self._step("latency beside copies", "latency", 2 * self.latency_s + 90, "--seconds", str(self.latency_s)),
            self._step("training with a full device", "full_memory", 3 * self.soak_s + 120, "--seconds", str(self.soak_s)),
        ]

    def benchmarks(self, size: Size) -> list[Step]:
        return [self._benchmark(part, size, expected) for part, expected in size.seconds.items()]

    def _benchmark(self, part: str, size: Size, expected_s: float) -> Step:
        command = [
            *(sys.executable, "-m", "bench.run", "--workload", "gpu", "--parts", part, "--one-process", "--out", "{out}"),
            *("--directory", "{directory}", "--scale", f"{size.scale:g}", "--rounds", str(size.rounds), "--rest-s", "0.1"),
            *("--rivals", RIVALS, "--fio", FIO),
        ]
        if self.pretended_cuda:
            command += ["--pretend-cuda", str(self.pretended_cuda), "--iteration-s", "0.02"]
        limit_s = OVER_EXPECTED * expected_s + OVER_S
        return Step(f"benchmark: {part}", command, limit_s, least_s=expected_s / 2, late=INCONCLUSIVE)

    def _step(self, name: str, program: str, limit_s: float, *more: str, **fields: object) -> Step:
        command = [sys.executable, "-m", f"{STEPS}.{program}", "--out", "{out}", "--directory", "{directory}", *more]
        if self.pretended_cuda:
            command += ["--pretend-cuda", str(self.pretended_cuda)]
        return Step(name, command, limit_s, **fields)  # type: ignore[arg-type]


def proxy_is_there(root: Path) -> bool:
    """Whether the device tests know it: without it they would run as before, and would be taken for more than they are."""
    return bool(PROXY.search((root / DEVICE_TESTS).read_text(encoding="utf-8")))
