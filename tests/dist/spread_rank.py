"""One of several ranks that read files together: does what each line of its input says, and answers with a line.

Arguments: rank, number of ranks, a file by which they find each other, how long collectives may take in seconds.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support import DEADLINE_S, assert_same, options, standard_output_for_answers

import ckpt
from ckpt import _native
from ckpt.loading.archive import Archive
from ckpt.restore.shared_read import Place, read_together_into, read_together

RANK, SIZE = int(sys.argv[1]), int(sys.argv[2])


class Counted(Archive):
    """Knows at its end how much it has read; may pass on other bytes than it has read."""

    counted = 0
    tampers = False

    def fill_share(self, destinations: Mapping[str, Any], begin: int, end: int) -> int:
        crc = super().fill_share(destinations, begin, end)
        if self.tampers:
            largest = max(destinations.values(), key=lambda place: place.nbytes())
            largest[(begin + end) // 2 - self.records["data/0"].offset] ^= 1
        return crc

    def close(self) -> None:
        self.counted = self.bytes_read
        super().close()


def load(
    path: str,
    fault: dict[str, Any] | None = None,
    truncate: int | None = None,
    map_location: Any = None,
    ranks: list[int] | None = None,
    compare: bool = True,
    tamper: bool = False,
    staged: bool = False,
) -> Any:
    """Compares with what this rank reads by itself.

    Args:
        fault, truncate: what happens to the file once it is open.
        tamper: one bit in the middle of this rank's share changes on the way.
    """

    def open_archive() -> Archive:
        archive = Counted(Path(path))
        archive.tampers = tamper
        if fault:
            _native.set_fault(**fault)
        if truncate is not None:
            os.truncate(path, truncate)
        return archive

    group = dist.new_group(ranks) if ranks else None
    try:
        contents, crc = read_together(open_archive, map_location, group, torch.device("cpu") if staged else None)
    finally:
        if fault:
            _native.clear_faults()
    assert isinstance(contents.archive, Counted)
    if compare:
        assert_same(ckpt.load(path, map_location, weights_only=False), contents.unpickle(map_location, weights_only=False))
    return {"crc": crc, "bytes_read": contents.archive.counted}


def fill(path: str, staged: bool = False) -> Any:
    """Into tensors that exist: each is a part of a larger one, whose other elements have to stay as they are."""
    expected = ckpt.load(path)
    around = {name: torch.full((tensor.numel() + 5,), 7, dtype=tensor.dtype) for name, tensor in expected.items()}
    targets = {name: around[name][2:-3].view(tensor.shape) for name, tensor in expected.items()}

    def prepare() -> tuple[Archive, Mapping[str, Place]]:
        archive = Archive(Path(path))
        return archive, {f"data/{index}": target for index, target in enumerate(targets.values())}

    filled = read_together_into(prepare, device=torch.device("cpu") if staged else None)
    for name, tensor in expected.items():
        assert torch.equal(targets[name], tensor), name
        assert around[name][:2].tolist() == [7, 7] and around[name][-3:].tolist() == [7, 7, 7], name
    return {"crc": filled.crc32}


def common(step: int) -> dict[str, Any]:
    return {"weights": torch.arange(3 << 20, dtype=torch.float32) + step, "bias": torch.full((5,), step), "note": f"of {step}"}


def own(step: int) -> dict[str, Any]:
    return {"rank": RANK, "values": torch.full((300_000,), RANK + step)}


def checkpointer(directory: str, **how: Any) -> ckpt.Checkpointer:
    return ckpt.Checkpointer(directory, keep=None, options=options(**how), coordinator="torch")


def save_steps(directory: str, steps: int) -> Any:
    with checkpointer(directory) as made:
        for step in range(steps):
            made.save(step, own(step), replicated=common(step)).result(DEADLINE_S)
    return {}


def bytes_read() -> int:
    """By this process so far, from the page cache or the disk."""
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counters["rchar"])


def restore(
    directory: str, way: str = "fresh", misfit: bool = False, fault: dict[str, Any] | None = None, readers: str = "all"
) -> Any:
    """
    Args:
        way: to "fresh" memory, "into" tensors, into such as lie "askew", or to memory that is "lent".
    """
    stride = 2 if way == "askew" else 1
    target = {"weights": torch.zeros(stride * ((3 << 20) + misfit))[::stride], "bias": torch.zeros(5, dtype=torch.int64), "note": ""}

    def lend(_: Any) -> dict[tuple[str], torch.Tensor]:
        return {("weights",): target["weights"]}

    into = {"replicated_into": target}
    how = {"fresh": {}, "into": into, "askew": into, "lent": {"replicated_into": lend}}[way]
    with checkpointer(directory, replicated_readers=readers) as made:
        if fault:
            _native.set_fault(**fault)
        before = bytes_read()
        try:
            found = made.restore(**how)
        finally:
            _native.clear_faults()
        read = bytes_read() - before
    assert found is not None
    assert way != "askew" or found.replicated["weights"].stride() == (2,)
    assert_same(common(found.step), found.replicated | {"weights": found.replicated["weights"].contiguous()})
    assert_same(own(found.step), found.state)
    assert way == "fresh" or found.replicated["weights"].data_ptr() == target["weights"].data_ptr()
    return {"step": found.step, "bytes_read": read}


def sleep(seconds: float) -> Any:
    time.sleep(seconds)
    return {}


def answer(line: str) -> dict[str, Any]:
    asked = json.loads(line)
    try:
        return dict(globals()[asked.pop("call")](**asked))
    except Exception as error:
        return {"error": type(error).__name__, "text": str(error), "ranks": list(getattr(error, "ranks", []))}


if __name__ == "__main__":
    answers = standard_output_for_answers()
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=float(sys.argv[4]))
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=RANK, world_size=SIZE, timeout=timeout)
    for line in sys.stdin:
        answers.write(json.dumps(answer(line)) + "\n")
