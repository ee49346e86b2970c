"""load() of the directory of a step, and of a directory of steps."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from support import DEADLINE_S, assert_same, options

import ckpt
from ckpt.directory import manifest as manifests
from ckpt.integrations.torch import CheckpointCallback

pytestmark = pytest.mark.usefixtures("native")


def weights(step: int) -> dict[str, Any]:
    return {"model": {"weight": torch.full((5_000,), float(step)), "bias": torch.ones(3)}, "epoch": step}


def save(directory: Path, step: int, *state: Any, **more: Any) -> Path:
    with ckpt.Checkpointer(directory, keep=None, options=options()) as checkpointer:
        checkpointer.restore()
        return checkpointer.save(step, *state, **more).result(DEADLINE_S)


def save_as_ranks(directory: Path, states: list[Any], replicated: Any = None) -> Path:
    """A step as several ranks leave it: files of jobs of one, under the names of ranks."""
    made, step = directory.parent / "one", directory / "step-000000000007"
    step.mkdir(parents=True)
    files = []
    for rank, state in enumerate(states):
        path = save(made / str(rank), 7, state)
        (entry,) = manifests.read(path).files
        name = f"rank-{rank:05d}.pt"
        shutil.copy(path / entry.name, step / name)
        files.append(manifests.FileEntry(name, entry.bytes, entry.crc32, manifests.RANK, rank))
    if replicated is not None:
        path = save(made / "all", 7, replicated=replicated)
        (entry,) = manifests.read(path).files
        shutil.copy(path / entry.name, step / entry.name)
        files.append(entry)
    (step / manifests.NAME).write_bytes(manifests.Manifest(7, 1, len(states), tuple(files)).to_json())
    return step


def test_a_step_and_the_newest_of_several(tmp_path: Path) -> None:
    first, second = save(tmp_path, 8, weights(8)), save(tmp_path, 5, replicated=weights(5))
    assert_same(weights(8), ckpt.load(first))
    assert_same(weights(5), ckpt.load(second))
    assert_same(weights(5), ckpt.load(str(tmp_path)))  # which was committed last
    assert_same({"model": weights(8)["model"]}, ckpt.load(first, keys="model.*"))
    assert ckpt.load(tmp_path, map_location="meta")["model"]["weight"].is_meta


def test_parts_are_one_dict(tmp_path: Path) -> None:
    step = save(tmp_path, 1, {"rng": [1, 2]}, replicated=weights(1))
    assert_same({**weights(1), "rng": [1, 2]}, ckpt.load(step))
    assert_same({"model": {"bias": torch.ones(3)}, "rng": [1, 2]}, ckpt.load(step, keys=["model.bias", "rng"]))
    with pytest.raises(ckpt.CheckpointError, match=r"nothing that \['moddel.\*'\] matches; its first paths are .*model.weight"):
        ckpt.load(step, keys=["moddel.*", "rng"])


def test_parts_that_do_not_fit_together_are_named(tmp_path: Path) -> None:
    step = save(tmp_path, 1, {"epoch": 2}, replicated=weights(1))
    with pytest.raises(ckpt.CheckpointError, match=r"keys in common \(epoch\): load 'replicated.pt' or 'state.pt' by itself"):
        ckpt.load(step)
    step = save(tmp_path, 2, [1, 2], replicated=weights(1))
    with pytest.raises(ckpt.CheckpointError, match="no dicts"):
        ckpt.load(step)


def test_what_a_callback_has_saved(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    with CheckpointCallback(tmp_path, model=model, options=options()) as callback:
        callback.step(1)
    loaded = ckpt.load(tmp_path, keys="model.*")
    assert loaded.keys() == {"model"}
    torch.nn.Linear(3, 2).load_state_dict(loaded["model"])
    assert_same(dict(model.state_dict()), dict(loaded["model"]))


@pytest.mark.parametrize("what", ["damaged", "lost"])
def test_one_without_a_good_manifest_is_not_passed_over_in_silence(
    what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1, weights(1))
    (tmp_path / "step-000000000003").mkdir()  # of a save that died: there is nothing to say of it
    newest = save(tmp_path, 2, weights(2)) / manifests.NAME
    newest.write_text("{") if what == "damaged" else newest.unlink()
    caplog.clear()
    assert_same(weights(1), ckpt.load(tmp_path))
    (told,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "step-000000000002" in told and "is passed over" in told


def test_a_damaged_one_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 1, weights(1))
    step = save(tmp_path, 2, weights(2))
    content = bytearray((step / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (step / "state.pt").write_bytes(content)
    with caplog.at_level(logging.INFO, "ckpt"):
        assert_same(weights(1), ckpt.load(tmp_path))
    assert "'step-000000000002' is passed over" in caplog.text and "'step-000000000001' is loaded" in caplog.text
    with pytest.raises(ckpt.CorruptError, match=r"state.pt"):
        ckpt.load(step)
    (tmp_path / "step-000000000001" / "state.pt").write_bytes(b"")
    with pytest.raises(ckpt.CorruptError, match=r"no checkpoint in .* is good: .*000002.*000001.*ckpt list.*ckpt verify"):
        ckpt.load(tmp_path)


def test_a_file_of_another_save_is_not_taken_for_it(tmp_path: Path) -> None:
    """Its own checksums are right, so the manifest has to tell."""
    other, step = save(tmp_path / "other", 1, weights(2)), save(tmp_path / "run", 1, weights(1))
    shutil.copy(other / "state.pt", step / "state.pt")
    with pytest.raises(ckpt.CorruptError, match="CRC-32 of its manifest"):
        ckpt.load(step)
    with pytest.raises(ckpt.CorruptError, match="CRC-32 of its manifest"):
        ckpt.load(step, keys="model.weight")


def test_files_of_ranks_that_were_exchanged_are_told_by_a_part_of_them(tmp_path: Path) -> None:
    """Both are good, and of the same size."""
    step = save_as_ranks(tmp_path / "run", [{"own": torch.full((9_000,), float(rank)), "rest": [rank]} for rank in (0, 1)])
    assert_same({"own": torch.full((9_000,), 1.0)}, ckpt.load(step, rank=1, keys="own"))
    first, second = step / "rank-00000.pt", step / "rank-00001.pt"
    first.rename(step / "aside")
    second.rename(first)
    (step / "aside").rename(second)
    for keys in (None, "own", "rest"):
        with pytest.raises(ckpt.CorruptError, match=r"rank-00001.pt' fails the CRC-32 of its manifest"):
            ckpt.load(step, rank=1, keys=keys)


def test_of_a_part_only_what_is_read_is_verified(tmp_path: Path) -> None:
    step = save(tmp_path, 1, {"first": torch.full((100_000,), 1.0), "second": torch.full((100_000,), 2.0)})
    path = step / "state.pt"
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((100,), 2.0).numpy().tobytes()) + 200_000] ^= 1
    path.write_bytes(content)
    assert_same({"first": torch.full((100_000,), 1.0)}, ckpt.load(step, keys="first"))
    with pytest.raises(ckpt.CorruptError, match=r"data/1' of '.*state.pt'"):
        ckpt.load(step, keys="second")


def test_a_part_of_a_file_without_checksums_is_compared_as_a_whole(tmp_path: Path) -> None:
    step = save(tmp_path, 1, {"first": torch.ones(9_000), "second": torch.zeros(9_000)})
    path, manifest = step / "state.pt", manifests.read(step)
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"first": torch.ones(9_000), "second": torch.zeros(9_000)}, path)
    finally:
        torch.serialization.set_crc32_options(before)
    content = bytearray(path.read_bytes())
    entry = manifests.FileEntry(path.name, len(content), zlib.crc32(content))
    (step / manifests.NAME).write_bytes(dataclasses.replace(manifest, files=(entry,)).to_json())
    assert_same({"second": torch.zeros(9_000)}, ckpt.load(step, keys="second"))
    content[content.index(torch.ones(100).numpy().tobytes()) + 4_000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ckpt.CorruptError, match="CRC-32 of its manifest"):
        ckpt.load(step, keys="second")


def test_of_several_ranks_one_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    step = save_as_ranks(tmp_path / "run", [{"rank": 0}, {"rank": 1}], weights(7))
    assert_same(weights(7), ckpt.load(step))
    assert "states that 2 ranks had for themselves, which are left out: load(path, rank=0)" in caplog.text
    for rank in (0, 1):
        assert_same({**weights(7), "rank": rank}, ckpt.load(step.parent, rank=rank))
    with pytest.raises(ckpt.CheckpointError, match="no state of rank 2: it was saved by 2 ranks"):
        ckpt.load(step, rank=2)


def test_a_rank_that_had_nothing_for_itself(tmp_path: Path) -> None:
    for replicated in (None, weights(7)):
        step = save_as_ranks(tmp_path / str(replicated is None), [{"rank": 0}, {"rank": 1}], replicated)
        manifest = manifests.read(step)
        left = tuple(file for file in manifest.files if (file.kind, file.rank) != (manifests.RANK, 1))
        (step / manifests.NAME).write_bytes(dataclasses.replace(manifest, files=left).to_json())
        with pytest.raises(ckpt.CheckpointError, match="no state of rank 1, which had none for itself"):
            ckpt.load(step, rank=1)
    step = save(tmp_path / "all", 1, replicated=weights(1))
    assert_same(weights(1), ckpt.load(step, rank=0))


def test_of_ranks_that_have_nothing_in_common_none_is_chosen_silently(tmp_path: Path) -> None:
    step = save_as_ranks(tmp_path / "run", [{"rank": 0}, {"rank": 1}])
    with pytest.raises(ckpt.CheckpointError, match=r"states that 2 ranks had.*say whose is wanted, as in load\(path, rank=0\)"):
        ckpt.load(step)
    assert ckpt.load(step, rank=1) == {"rank": 1}


def test_what_is_sharded_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    step = save(tmp_path, 1, {"epoch": 1}, sharded={"a": torch.ones(3)})
    assert ckpt.load(step) == ckpt.load(tmp_path) == {"epoch": 1}
    assert "is loaded without its sharded state: restore(sharded_into=)" in caplog.text
    save(tmp_path, 2, sharded={"a": torch.ones(3)})
    with pytest.raises(ckpt.CheckpointError, match=r"000002' has nothing but a sharded state: restore\(sharded_into=\)"):
        ckpt.load(tmp_path)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    step = save(tmp_path, 1, weights(1))
    with pytest.raises(ValueError, match="rank= is for the directory of a step"):
        ckpt.load(step / "state.pt", rank=0)
    for rank in ("0", True):
        with pytest.raises(TypeError, match="rank must be"):
            ckpt.load(step, rank=rank)  # type: ignore[arg-type]
    (step / "manifest.json").unlink()
    with pytest.raises(ckpt.NotACheckpointError, match="holds no checkpoint: `ckpt list"):
        ckpt.load(tmp_path)
    with pytest.raises(ckpt.NotACheckpointError, match=r"manifest\.json"):
        ckpt.load(step)


@pytest.mark.parametrize("keys", [5, [5], ["model", 5], {"model": 1}.values()])
def test_keys_that_are_no_patterns(keys: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"keys must be a pattern over dotted paths, such as 'model\.\*', or a list"):
        ckpt.load(tmp_path / "any", keys=keys)
