"""What kind of machine this is: everything that a reader must know to judge the other results. None of it is indispensable."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import psutil
import torch

from bench.gpu_report.findings import INCONCLUSIVE, PASS, Findings, step_parser
from bench.measure.direct_writes import DirectLoop
from bench.measure.disk_pages import fsync_path
from bench.measure.machine import file_system
from bench.measure.sampling import GIB, MIB, clock

SMI_TIMEOUT_S = 60.0
SMI_FIELDS = {  # of `nvidia-smi -q -x`, for each GPU
    "smi_name": "product_name",
    "uuid": "uuid",
    "mig_mode": "mig_mode/current_mig",
    "pci_bus_id": "pci/pci_bus_id",
    "pcie_generation_now": "pci/pci_gpu_link_info/pcie_gen/current_link_gen",
    "pcie_generation_most": "pci/pci_gpu_link_info/pcie_gen/max_link_gen",
    "pcie_width_now": "pci/pci_gpu_link_info/link_widths/current_link_width",
    "pcie_width_most": "pci/pci_gpu_link_info/link_widths/max_link_width",
    "nvlink_c2c": "c2c_mode",
    "ecc": "ecc_mode/current_ecc",
    "persistence_mode": "persistence_mode",
    "power_limit": "gpu_power_readings/current_power_limit",
}
WRITE_BYTES, WRITE_AGAIN_S = 512 * MIB, 2.0  # of the look at the disk; a fast one is looked at again, with more
UNLIMITED = 1 << 60


def main(arguments: list[str]) -> None:
    asked = step_parser(__doc__).parse_args(arguments)
    first = partial(of_stand_in, asked.pretend_cuda) if asked.pretend_cuda else of_torch
    ways: dict[str, Callable[[], dict[str, Any]]] = {"torch": first, "NCCL": of_nccl, "nvidia-smi": of_smi}
    ways |= {"the host": of_host, "the disk": partial(of_disk, asked.directory)}
    facts: dict[str, Any] = {}
    missing = {}
    for name, gather in ways.items():
        try:
            facts |= gather()
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}"
    if "pci_bus_id" in facts:
        facts["gpu_numa_node"] = numa_node(facts["pci_bus_id"])
    reason = "; ".join(f"{name}: {error}" for name, error in missing.items())
    Findings(asked.out).add("facts", INCONCLUSIVE if missing else PASS, reason, **facts)


def of_torch() -> dict[str, Any]:
    found: dict[str, Any] = {"torch": torch.__version__, "torch_cuda": torch.version.cuda}
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    capability = f"{properties.major}.{properties.minor}"
    found |= {"gpu": properties.name, "gpus": torch.cuda.device_count(), "compute_capability": capability}
    found |= {
        "gpu_memory_bytes": total,
        "gpu_free_bytes": free,
        "integrated": bool(getattr(properties, "is_integrated", False)),
    }
    found["torch_uuid"] = str(getattr(properties, "uuid", ""))
    return found


def of_nccl() -> dict[str, Any]:
    return {"nccl": ".".join(map(str, torch.cuda.nccl.version()))} if torch.version.cuda else {}


def of_stand_in(library: Path) -> dict[str, Any]:
    versions = {"torch": torch.__version__, "torch_cuda": torch.version.cuda}
    return versions | {"gpu": f"none: {library.name} stands in for the driver", "gpus": 0, "stand_in": True}


def of_smi() -> dict[str, Any]:
    """
    Raises:
        OSError, subprocess.SubprocessError, ElementTree.ParseError: there is no nvidia-smi, or it answers something else.
    """
    command = ["nvidia-smi", "-q", "-x"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=SMI_TIMEOUT_S, check=True).stdout
    root = ElementTree.fromstring(said)
    uuid = own_uuid()
    gpus = root.findall("gpu")
    chosen = next((gpu for gpu in gpus if uuid and uuid in text_of(gpu, "uuid")), gpus[0])
    found = {name: text_of(chosen, path) for name, path in SMI_FIELDS.items()}
    found |= {
        "driver": text_of(root, "driver_version"),
        "driver_cuda": text_of(root, "cuda_version"),
        "gpus_in_machine": len(gpus),
    }
    return {name: value for name, value in found.items() if value not in ("", "N/A")}


def own_uuid() -> str:
    if torch.version.cuda is None or not torch.cuda.is_available():
        return ""
    return str(getattr(torch.cuda.get_device_properties(0), "uuid", ""))


def text_of(element: ElementTree.Element, path: str) -> Any:
    return (element.findtext(path) or "").strip()


def numa_node(bus_id: str) -> int | None:
    """Of `00000000:3B:00.0`; the kernel says -1 where there is only one."""
    domain, _, rest = bus_id.lower().partition(":")
    path = Path(f"/sys/bus/pci/devices/{domain[-4:]}:{rest}/numa_node")
    return int(path.read_text()) if path.exists() else None


def of_host() -> dict[str, Any]:
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    memory = psutil.virtual_memory()
    found: dict[str, Any] = {
        "locked_memory_limit_bytes": None if locked == resource.RLIM_INFINITY else locked,
        "cgroup_memory_bytes": cgroup_limit(),
        "memory_bytes": memory.total,
        "memory_available_bytes": memory.available,
        "numa_nodes": len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))),
        "cores": len(os.sched_getaffinity(0)),
        "shared_memory_free_bytes": shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else 0,
        "container": Path("/.dockerenv").exists() or Path("/run/.containerenv").exists(),
    }
    found |= {tool.replace("-", "_"): shutil.which(tool) is not None for tool in ("fio", "compute-sanitizer")}
    return found


def cgroup_limit() -> int | None:
    """The lowest limit of this process's memory group and those above it; None: there is none."""
    limits = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = Path("/sys/fs/cgroup"), "memory.max"
        elif "memory" in controllers.split(","):
            root, name = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        else:
            continue
        place = root / path.lstrip("/")
        for group in [place, *place.parents]:
            if group.is_relative_to(root) and (group / name).exists():
                said = (group / name).read_text().strip()
                limits.append(UNLIMITED if said == "max" else int(said))
    lowest = min(limits, default=UNLIMITED)
    return None if lowest >= UNLIMITED else lowest


def of_disk(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"file_system": file_system(directory), "disk_free_bytes": shutil.disk_usage(directory).free}
    most = found["disk_free_bytes"] // 4
    first = write_rate(directory / "looked-at", min(WRITE_BYTES, most))
    more = min(int(first * WRITE_AGAIN_S), 8 * GIB, most)
    rate = write_rate(directory / "looked-at", more) if more > WRITE_BYTES else first
    return found | {"disk_write_GBps": rate / 1e9}


def write_rate(path: Path, nbytes: int) -> float:
    """Bytes per second, durable: directly where the file system can, else through the page cache."""
    try:
        return DirectLoop(path, nbytes, 4, 4 * MIB).run()
    except OSError:
        path.unlink(missing_ok=True)
        began = clock()
        block = os.urandom(MIB)
        with path.open("wb") as file:
            for _ in range(max(1, nbytes // MIB)):
                file.write(block)
        fsync_path(path)
        elapsed = clock() - began
        path.unlink()
        return max(1, nbytes // MIB) * MIB / elapsed


if __name__ == "__main__":
    main(sys.argv[1:])
