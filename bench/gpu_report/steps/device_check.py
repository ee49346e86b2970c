"""Whether each device keeps the order that saving in the background relies on: `ckpt.check_devices()`."""

from __future__ import annotations

import sys

import torch

import ckpt
from bench.gpu.device import find_device
from bench.gpu_report.findings import FAIL, INCONCLUSIVE, PASS, Findings, step_parser

VERDICTS = {"passed": PASS, "failed": FAIL, "late": FAIL, "inconclusive": INCONCLUSIVE}
TRIES = 3  # an inconclusive one may be so by chance
TIMEOUT_S = 15.0


def main(arguments: list[str]) -> None:
    asked = step_parser(__doc__).parse_args(arguments)
    findings = Findings(asked.out)
    device = find_device(asked.pretend_cuda)
    for number in range(1 if device.stand_in else torch.cuda.device_count()):
        with findings.guard(f"device {number}"):
            tried, verdict = 0, "inconclusive"
            while verdict == "inconclusive" and tried < TRIES:
                (found,) = ckpt.check_devices([number], timeout_s=TIMEOUT_S)
                tried, verdict = tried + 1, found.verdict
            findings.add(
                f"device {number}", VERDICTS[found.verdict], f"{found.verdict}: {found.reason}" if found.reason else "",
                tried=tried, seconds=found.seconds,
            )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
