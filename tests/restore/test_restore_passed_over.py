"""Targets of a restore() that has passed a checkpoint over: nothing of it may stay in them unnoticed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import DEADLINE_S, options
from test_restore_into import damage_payload, file_of

import ckpt
from ckpt.errors import CheckpointError, DeadlineError, MismatchError
from ckpt.loading.archive import Beside
from ckpt.restore import file_readers


@pytest.fixture
def job(tmp_path: Path) -> Iterator[ckpt.Checkpointer]:
    """The newer checkpoint has a tensor more, and is damaged where it is largest."""
    with ckpt.Checkpointer(tmp_path, options=options()) as checkpointer:
        older = {"weights": torch.full((100_000,), 1.0)}
        checkpointer.save(1, older).result(DEADLINE_S)
        checkpointer.save(2, {"weights": torch.full((100_000,), 2.0), "more": torch.full((9_000,), 2.0)}).result(DEADLINE_S)
        damage_payload(file_of(tmp_path, 2))
        yield checkpointer


def target() -> dict[str, torch.Tensor]:
    return {"weights": torch.zeros(100_000), "more": torch.zeros(9_000)}


def test_what_the_older_one_lacks_is_an_error_even_if_not_strict(job: ckpt.Checkpointer) -> None:
    with pytest.raises(MismatchError, match="more"):
        job.restore(into=target(), strict=False)


def test_lent_memory_that_the_older_one_does_not_fill(job: ckpt.Checkpointer) -> None:
    memory = target()

    def lend(found: dict[str, Any]) -> dict[tuple[Any, ...], torch.Tensor]:
        return {(key,): memory[key] for key in found}

    with pytest.raises(CheckpointError, match="1 tensors that hold parts of a damaged checkpoint"):
        job.restore(into=lend)


def test_lent_memory_that_the_older_one_fills(job: ckpt.Checkpointer) -> None:
    memory = torch.zeros(100_000)
    found = job.restore(into=lambda _: {("weights",): memory})
    assert found is not None and found.step == 1 and found.state["weights"] is memory
    assert torch.equal(memory, torch.full((100_000,), 1.0))


@pytest.mark.parametrize("lends", [False, True])
def test_a_read_that_hangs_may_come_back_later(job: ckpt.Checkpointer, lends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the memory that it was to fill must not be used, however good the older checkpoint is."""

    class Hanging(file_readers.Archive):
        def fill(self, destinations: Any, *, whole: bool = False, **how: Any) -> int | None:
            if whole and "step-000000000002" in str(self.path):
                raise DeadlineError("reading took too long")
            return super().fill(destinations, whole=whole, **how)

    monkeypatch.setattr(file_readers, "Archive", Hanging)
    memory = target()
    del memory["more"]
    with pytest.raises(CheckpointError, match="make that anew"):
        job.restore(into=(lambda _: {("weights",): memory["weights"]}) if lends else memory, strict=False)
    assert not memory["weights"].any(), "nor is it filled from the older one"
    found = job.restore()
    assert found is not None and found.step == 1, "without a target nothing is lost"


def test_nothing_can_be_lent_to_a_tuple(tmp_path: Path) -> None:
    memory = torch.zeros(50_000)
    with ckpt.Checkpointer(tmp_path, options=options()) as checkpointer:
        checkpointer.save(1, {"pair": (torch.ones(50_000), 2)}).result(DEADLINE_S)
        found = checkpointer.restore(into=lambda _: {("pair", 0): memory})
    assert found is not None and torch.equal(found.state["pair"][0], torch.ones(50_000))
    assert not memory.any()


@pytest.mark.parametrize("to", ["new memory", "a target", "lent memory"])
def test_every_read_has_the_deadline_of_the_options(job: ckpt.Checkpointer, to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    deadlines: list[float] = []

    class Noting(file_readers.Archive):
        def __init__(self, path: Path, timeout_s: float = -1.0, beside: Beside | None = None) -> None:
            deadlines.append(timeout_s)
            super().__init__(path, timeout_s, beside)

    monkeypatch.setattr(file_readers, "Archive", Noting)
    memory = torch.zeros(100_000)
    into = {"new memory": None, "a target": {"weights": memory}, "lent memory": lambda _: {("weights",): memory}}[to]
    found = job.restore(into=into, strict=False)
    assert found is not None and found.step == 1
    assert deadlines == [job.options.timeout_s] * 2
