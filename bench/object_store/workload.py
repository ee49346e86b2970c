"""A checkpoint on its way to an object store and back, by ours and by obstore alone."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import torch

import ckpt
from bench.measure.report import Bar, Report
from bench.measure.sampling import GIB, Sample, Settings, Side, Values, clock, interleave, note
from bench.object_store.servers import Ministack, ObjectServer, Seaweed, weed
from ckpt.drain import journal as journals
from ckpt.drain import remote_place
from ckpt.drain.remote_place import Remote, place_of

STATE_BYTES = 1 * GIB
TIMEOUT_S = 900
OURS, ALONE = "ours", "obstore alone"

HOW_UP = (
    "the drain: from the first byte that it reads until the checkpoint is committed, by its journal; obstore.put() of the same "
    "file, with parts of the same size, as many in flight, at the same priority: the call"
)
HOW_DOWN = "restore() in a new home; obstore.get() of the same file, written to one: no checksums, nothing is made of it"


def measure_object(settings: Settings, report: Report) -> None:
    nbytes = settings.sized(STATE_BYTES)
    with settings.workspace() as directory:
        (directory / "server").mkdir()
        kind = Ministack if weed() is None else Seaweed
        with kind(directory / "server") as server:
            note(f"the store is {kind.name}")
            work = _Work(directory, server, nbytes)
            sides = [Side(OURS, work.upload), Side(ALONE, work.put)]
            up = interleave(sides, settings.rounds_or(5), settings.settle)
            sides = [Side(OURS, work.restore), Side(ALONE, work.get)]
            down = interleave(sides, settings.rounds_or(5), settings.settle)
    more = {"nbytes": nbytes, "server": kind.name}
    add(report, "upload", up, how=HOW_UP, bar=Bar(">=", 0.8), **more)
    add(report, "restore", down, how=HOW_DOWN, bar=None, **more)


def add(report: Report, what: str, samples: dict[str, list[Sample]], **more: object) -> None:
    bar = more.pop("bar")
    for side, found in samples.items():
        report.add("object", f"{what}, {side}", "s", found, **more)
    report.add_ratio("object", f"{what}: rate / that of obstore alone", samples[ALONE], samples[OURS], bar=bar, **more)


class _Work:
    """One checkpoint at home, and what is done with it."""

    def __init__(self, directory: Path, server: ObjectServer, nbytes: int) -> None:
        self._directory = directory
        self._server = server
        self._bucket = server.make_bucket()
        self._numbers = itertools.count()
        self._home = directory / "home"
        state = {f"tensor{number}": torch.randn(max(1, nbytes // 64 // 4)) for number in range(64)}
        with ckpt.Checkpointer(self._home) as checkpointer:
            checkpointer.save(1, state).result()
        (self._file,) = self._home.glob("step-*/*.pt")
        self._carried = ""
        self._put = ""

    def upload(self) -> Values:
        """To a place that is new each time."""
        url = f"s3://{self._bucket}/ours-{next(self._numbers)}"
        place = place_of(self._home, url)
        (place / journals.FOLDER).mkdir(parents=True)
        usual = {"owner": "benchmark", "instead_of": "", "ticket": "", "keep": None, "every_steps": None, "every_s": None}
        more = {"rate": None, "direct_io": True, "pace": place / "pace", "pids": {}, "options": self._server.options()}
        remote_place.write(place, Remote(url=url, home=self._home, **usual, **more))
        run([sys.executable, "-m", "ckpt", "drain", str(place), "--once"])
        (journal,) = journals.read_all(place)
        if journal.state != journals.COMMITTED:
            raise RuntimeError(f"nothing was carried to '{url}': {journal.text}")
        self._carried = url
        return {"seconds": journal.ended - journal.began}

    def put(self) -> Values:
        self._put = f"s3://{self._bucket}/alone-{next(self._numbers)}"
        return self._client("put", self._file)

    def restore(self) -> Values:
        tier = ckpt.Tier.remote(self._carried, options=self._server.options(), scratch=self._directory / "scratch")
        with ckpt.Checkpointer(self._directory / "nothing-yet", tiers=[tier]) as checkpointer:
            began = clock()
            found = checkpointer.restore()
            seconds = clock() - began
        if found is None or set(found.sources.values()) != {"object store"}:
            raise RuntimeError("it was not restored from the store")
        return {"seconds": seconds}

    def get(self) -> Values:
        target = self._directory / "fetched"
        try:
            return self._client("get", target)
        finally:
            target.unlink(missing_ok=True)

    def _client(self, what: str, file: Path) -> Values:
        endpoint = self._server.options()["endpoint"]
        command = [sys.executable, "-m", "bench.object_store.client", what, self._put, "one-file", str(file)]
        return {"seconds": float(run([*command, "--endpoint", endpoint]))}


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=dict(os.environ))
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr}")
    return done.stdout
