"""Saves that write only what has changed: every file is whole by itself and has the right values, whatever came before."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from mounting import MIB, free_bytes, mounted
from reuse_runs import KINDS, Run, shared_bytes, sharing, sync  # noqa: F401  sharing is a fixture
from support import DEADLINE_S, as_bytes, assert_same, options

import ckpt
from ckpt.dcp import DcpCheckpointer
from ckpt.errors import StorageError

FROZEN = 4 * MIB


@pytest.mark.parametrize("sharing", KINDS, indirect=True)
@pytest.mark.parametrize("direct_io", [True, False])
def test_generation_after_generation(sharing: Path, direct_io: bool) -> None:  # noqa: F811
    """What is frozen is written twice, and never again; the loss of any checkpoint does no harm to the others."""
    with Run(sharing, direct_io=direct_io) as run:
        reused = [run.save() for _ in range(12)]
        assert reused[:2] == [0, 0]
        assert all(FROZEN - MIB // 8 <= each <= FROZEN for each in reused[2:])
        assert shared_bytes(run.file(7)) >= FROZEN - MIB // 8
    order = list(run.saved)
    random.Random(3).shuffle(order)
    while order:
        run.check(*order)
        shutil.rmtree(run.file(order.pop()).parent)


@pytest.mark.parametrize("sharing", KINDS, indirect=True)
def test_it_takes_no_room_for_what_is_shared(sharing: Path) -> None:  # noqa: F811
    with Run(sharing, frozen=16) as run:
        for _ in range(3):
            run.save()
        sync(sharing)
        before = free_bytes(sharing)
        for _ in range(4):
            run.save()
        sync(sharing)
        assert before - free_bytes(sharing) < 4 * 8 * MIB, "of 70 MiB that were saved"


def test_a_save_finds_room_for_what_has_changed_and_tells_if_there_is_none(tmp_path: Path) -> None:
    with mounted("xfs", tmp_path / "disk", 320 * MIB) as place, Run(place, frozen=48, keep=2, max_failed_saves=0) as run:
        for _ in range(3):
            run.save()
        sync(place)
        ballast = place / "ballast"
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free_bytes(place) - 24 * MIB)
        assert run.save() > 47 * MIB
        run.state["frozen"].add_(1)
        error = run.begin().exception(DEADLINE_S)
        assert isinstance(error, StorageError) and error.errno == errno.ENOSPC and "free space" in str(error)
        run.check(2, 3)
        ballast.unlink()
        assert run.save() == 0
        assert run.save() == 0
        assert run.save() > 47 * MIB


@pytest.mark.parametrize("place", [0, FROZEN // 2 + 1, FROZEN - 1])
def test_one_changed_byte_is_saved(sharing: Path, place: int) -> None:  # noqa: F811
    with Run(sharing) as run:
        for _ in range(3):
            run.save()
        as_bytes(run.state["frozen"])[place] ^= 1
        reused = [run.save() for _ in range(3)]
        assert FROZEN - MIB // 2 < reused[0] <= reused[1] <= reused[2] > FROZEN - MIB // 8
        if place == FROZEN // 2 + 1:
            assert reused[0] == reused[1] < reused[2], "the piece is written, and once more, since it has no hash yet"
        as_bytes(run.state["frozen"])[place] ^= 1
        run.save()
        run.check(*run.saved)


def test_what_changes_and_changes_back_is_right(sharing: Path) -> None:  # noqa: F811
    with Run(sharing) as run:
        kept = run.state["frozen"].clone()
        for number in range(8):
            run.state["frozen"].copy_(kept if number % 3 else kept + 1)
            run.save()
        run.check(*run.saved)


def test_bytes_of_the_same_checksum_are_told_apart(sharing: Path) -> None:  # noqa: F811
    """The polynomial of CRC-32 itself, laid over any bytes, changes no checksum."""
    delta = torch.tensor(list((0xEDB88320 << 1 | 1).to_bytes(5, "little")), dtype=torch.uint8)
    with Run(sharing) as run:
        for _ in range(3):
            run.save()
        frozen = as_bytes(run.state["frozen"])
        before = zlib.crc32(frozen.numpy().tobytes())
        frozen[MIB : MIB + 5] ^= delta
        assert zlib.crc32(frozen.numpy().tobytes()) == before
        assert FROZEN // 2 < run.save() < FROZEN - MIB // 8
        run.save()
        run.check(*run.saved)


def test_everything_is_written_anew_now_and_then(sharing: Path) -> None:  # noqa: F811
    with Run(sharing, refresh_every=4) as run:
        assert [run.save() > 0 for _ in range(12)] == [*[False] * 2, *[True] * 3, False, *[True] * 3, False, *[True] * 2]
        assert shared_bytes(run.file(4)) > 0
        shared = [json.loads((run.file(step).parent / "manifest.json").read_text())["files"][0] for step in (4, 5, 6)]
        assert [each.get("shared_step") for each in shared] == [3, None, 5]


def test_nothing_is_reused_if_that_is_not_wanted(sharing: Path) -> None:  # noqa: F811
    with Run(sharing, reuse=False) as run:
        assert [run.save() for _ in range(4)] == [0] * 4
        assert shared_bytes(run.file(3)) == 0


def test_shapes_come_and_go(sharing: Path) -> None:  # noqa: F811
    """By chance: records that grow, shrink, move, come back, or change somewhere."""
    chance = random.Random(11)
    with Run(sharing, keep=3, refresh_every=5) as run:
        total = 0
        for _ in range(25):
            for name in [f"more-{number}" for number in range(3)]:
                action = chance.randrange(6)
                if action == 0:
                    run.state.pop(name, None)
                elif action == 1 or name not in run.state:
                    length = chance.choice([MIB // 8, MIB // 4 + chance.randrange(9), MIB // 2, MIB // 2 + 1])
                    run.state[name] = torch.full((length,), float(chance.randrange(3)))
                elif action == 2:
                    run.state[name][chance.randrange(run.state[name].numel())] += 1
            if chance.random() < 0.1:
                run.state = dict(chance.sample(list(run.state.items()), len(run.state)))
            total += run.save()
        run.check(run.step, run.step - 1, run.step - 2)
        assert total > 10 * MIB


def test_what_is_no_tensor_moves_nothing(sharing: Path) -> None:  # noqa: F811
    """Neither the memory of a pickle that is not small, nor a number that takes some bytes more than before."""
    with Run(sharing) as run:
        run.state["history"] = [float(number) for number in range(1000)]
        for step in range(8):
            run.state["count"] = 100**step
            assert (run.save() > FROZEN - MIB // 8) == (step > 1)


def test_saves_that_overlap(sharing: Path) -> None:  # noqa: F811
    with Run(sharing, max_in_flight=3) as run:
        pending = [run.begin() for _ in range(12)]
        for each in pending:
            each.result(DEADLINE_S)
        run.check(*run.saved)
        assert sum(each.stats.reused_bytes for each in pending) > 0


def test_bytes_that_leave_behind_save(sharing: Path) -> None:  # noqa: F811
    """Of a model that is half frozen, by way of fences."""
    model = torch.nn.Sequential(torch.nn.Linear(700, 700), torch.nn.Linear(700, 700))
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model[1].parameters())
    with ckpt.Checkpointer(sharing / "run", keep=None, options=options()) as checkpointer:
        expected, pending = [], []
        for step in range(6):
            model(torch.randn(2, 700)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            expected.append({key: value.clone() for key, value in model.state_dict().items()})
            pending.append(checkpointer.save(step, state))
        for step, each in enumerate(pending):
            found = torch.load(each.result(DEADLINE_S) / "state.pt")
            assert_same(list(expected[step].values()), list(found["model"].values()))
        assert sum(each.stats.reused_bytes for each in pending) > MIB


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_bundles(sharing: Path, suffix: str) -> None:  # noqa: F811
    states = [{"frozen": torch.randn(MIB // 2), "learning": torch.randn(MIB // 3)} for _ in range(2)]
    with ckpt.BundleCheckpointer(options=options()) as checkpointer:
        reused = []
        for step in range(4):
            bundle = checkpointer.begin(sharing / "root", f"step{step}", step=step)
            for number, state in enumerate(states):
                state["learning"].add_(1)
                bundle.save(state, bundle.directory / f"part-{number}-{step}{suffix}")
            pending = bundle.commit()
            pending.result(DEADLINE_S)
            reused.append(pending.stats.reused_bytes)
            for number, state in enumerate(states):
                assert_same(state, ckpt.load(sharing / "root" / f"step{step}" / f"part-{number}-{step}{suffix}"))
    assert reused[:2] == [0, 0] and min(reused[2:]) > 3 * MIB


def test_sharded_states(sharing: Path) -> None:  # noqa: F811
    state = {"frozen": torch.randn(MIB), "learning": torch.randn(MIB)}
    with DcpCheckpointer(options=options(), alone=True) as saver:
        reused = []
        for step in range(4):
            state["learning"].add_(1)
            pending = saver.save(sharing / f"step{step}", state)
            pending.result(DEADLINE_S)
            reused.append(pending.stats.reused_bytes)
            found = {"frozen": torch.zeros(MIB), "learning": torch.zeros(MIB)}
            torch.distributed.checkpoint.load(found, checkpoint_id=sharing / f"step{step}", no_dist=True)
            assert_same(state, found)
    assert reused[:2] == [0, 0] and min(reused[2:]) > 3 * MIB


def test_values_before_tensors_of_a_sharded_state_move_none(sharing: Path) -> None:  # noqa: F811
    with ckpt.Checkpointer(sharing / "run", keep=None, options=options()) as checkpointer:
        state: dict[str, Any] = {
            "values": [],
            "small": torch.ones(100),
            "frozen": torch.randn(MIB),
            "learning": torch.randn(MIB),
        }
        for step in range(8):
            state["values"] = [100**step, [1.0] * (100 + step)]
            state["learning"].add_(1)
            pending = checkpointer.save(step, sharded=state)
            pending.result(DEADLINE_S)
            assert (pending.stats.reused_bytes > FROZEN - MIB // 8) == (step > 1)


def test_files_are_held_open_as_long_as_they_serve(sharing: Path) -> None:  # noqa: F811
    """And no longer, whoever keeps what save() has returned."""
    kept: list[Any] = []
    with Run(sharing, keep=1) as run:
        counts = []
        for _ in range(7):
            kept.append(run.begin())
            kept[-1].result(DEADLINE_S)
            counts.append(len(open_files(sharing)))
        assert open_files(sharing) == [run.file(6)] and counts == [1] * 7
    assert open_files(sharing) == []


def test_a_forked_child_holds_none(sharing: Path) -> None:  # noqa: F811
    """As a worker that lives as long as the training: it would keep the room of what is removed."""
    with Run(sharing) as run:
        run.save()
        assert len(open_files(sharing)) == 1
        child = os.fork()
        if child == 0:
            os._exit(len(open_files(sharing)))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert [run.save() > 0 for _ in range(3)] == [False, True, True]


def test_who_removes_a_checkpoint_for_its_room_gets_it(sharing: Path, native: Any) -> None:  # noqa: F811
    with Run(sharing, max_failed_saves=0) as run:
        for _ in range(3):
            run.save()
        native.set_fault("pwritev", error=errno.ENOSPC)
        assert isinstance(run.begin().exception(DEADLINE_S), ckpt.errors.StorageError)
        native.clear_faults()
        assert open_files(sharing) == []
        assert [run.save() > 0 for _ in range(3)] == [False, False, True]
        run.check(0, 1, 2, 4, 5, 6)


def open_files(place: Path) -> list[Path]:
    links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
    found = [Path(os.readlink(link)) for link in links if os.path.lexists(link)]
    return [path for path in found if path.is_relative_to(place) and ".pt" in path.name]


def test_elsewhere_nothing_is_kept(tmp_path: Path) -> None:
    """Of a directory whose file system is not known to share blocks."""
    with Run(tmp_path) as run:
        assert [run.save() for _ in range(4)] == [0] * 4
        assert not run.checkpointer._baselines._left
