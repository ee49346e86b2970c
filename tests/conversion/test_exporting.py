"""`ckpt export`: what is read back is what was saved, from whatever format and number of ranks; and it needs little memory."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import export_ranks
import pytest
import torch
import torch.distributed.checkpoint as dcp
from command_line import Shell, state, step_in
from nursery import Nursery, sharding_nurseries
from safetensors.torch import load_file, save_file
from support import options
from test_verify import flip, place_of
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import ckpt
from ckpt.conversion.dcp_directory import write_dcp
from ckpt.conversion.exporting import Chosen
from ckpt.conversion.sources import Entry, Piece
from ckpt.torch_private import flatten_state_dict

MiB = 1 << 20


@pytest.fixture(scope="module")
def ranks() -> Iterator[list[Nursery]]:
    with sharding_nurseries(2) as nurseries:
        yield nurseries


@pytest.fixture(scope="module")
def two_ranks(ranks: list[Nursery], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("two")
    children = [
        ranks[rank].start(f"import export_ranks; export_ranks.save({rank}, 2, {str(directory)!r})") for rank in range(2)
    ]
    ended = [child.wait() for child in children]
    assert [each.returncode for each in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    return directory


@pytest.mark.parametrize("which", ["torch", "ours"])
def test_a_sharded_checkpoint_becomes_one(which: str, two_ranks: Path, shell: Shell, tmp_path: Path) -> None:
    said = shell.json("export", two_ranks / which, "-o", tmp_path / "m.safetensors", "--format", "safetensors")
    found = load_file(tmp_path / "m.safetensors")
    assert found.keys() == {"model.rows", "model.columns"} and said["tensors"] == 2
    assert all(torch.equal(tensor, export_ranks.whole()) for tensor in found.values())
    assert "epochs.1.lr" in said["left_out"]
    assert shell("export", two_ranks / which, "-o", tmp_path / "m.pt", "--format", "pt").code == 0
    loaded = torch.load(tmp_path / "m.pt", weights_only=True)
    assert torch.equal(loaded["model"]["rows"], export_ranks.whole()) and loaded["epochs"] == [1, {"lr": 0.5}]
    assert ("seed" in loaded, loaded.get("note")) == (False, "same" if which == "ours" else None)


def test_with_what_one_rank_has_for_itself(two_ranks: Path, shell: Shell, tmp_path: Path) -> None:
    words = ("export", two_ranks / "ours", "-o", tmp_path / "m.pt", "--format", "pt", "--rank")
    assert shell(*words, "1").code == 0 and torch.load(tmp_path / "m.pt")["seed"] == 1
    assert shell(*words, "7").code == 3
    same = ("diff", two_ranks / "ours", two_ranks / "ours", "--values")
    document, said = shell.json(*same), shell(*same)
    assert document["same"] and len(document["not_compared"]) == 2 and all(".pt" in name for name in document["not_compared"])
    assert document["not_compared"][0] in said.out and "--rank" in said.out
    assert len(shell.json(*same, "--rank", "1")["not_compared"]) == 1
    assert shell.json("diff", two_ranks / "torch", two_ranks / "torch", "--values")["not_compared"] == []


def test_all_that_a_state_holds(shell: Shell, tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.randn(3, 4, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    wanted: dict[str, Any] = {
        "w": parameter.detach(),
        "optimizer": optimizer.state_dict(),
        "view": torch.arange(12).reshape(3, 4).t()[1:],
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(5, dtype=torch.uint16),
        "nothing": {"a": {}, "b": []},
        "step": 7,
    }
    ckpt.save(wanted, tmp_path / "a.pt", options=options()).result()
    assert shell("export", tmp_path / "a.pt", "-o", tmp_path / "b.pt", "--format", "pt").code == 0
    found = torch.load(tmp_path / "b.pt", weights_only=True)
    assert repr(found) == repr(wanted), "optimizer states have numbers as keys, and no lists of them"
    assert repr(ckpt.load(tmp_path / "b.pt")) == repr(wanted), "our own reader verifies it"
    assert torch.load(tmp_path / "b.pt", mmap=True)["w"].data_ptr() % 64 == 0


def test_choices(shell: Shell, three_steps: Path, tmp_path: Path) -> None:
    words = ["--format", "safetensors", "--keys", "model.*", "--strip", "model.", "--dtype", "float16"]
    said = shell("export", f"{three_steps}:2", "-o", tmp_path / "m.safetensors", *words)
    found = load_file(tmp_path / "m.safetensors")
    assert said.code == 0 and {name: tensor.dtype for name, tensor in found.items()} == {
        **{"weight": torch.float16, "bias": torch.int64}
    }
    assert torch.equal(found["weight"], state(2)["model"]["weight"].half())
    assert shell("export", f"{three_steps}:2", "-o", tmp_path / "n", "--format", "pt", "--keys", "modle.*").code == 1
    assert not (tmp_path / "n").exists()


@pytest.mark.parametrize(
    ("prefix", "more", "words"),
    [
        ("modle.", (), "did you mean 'model.'"),
        ("model.weight.", (), "did you mean 'model.'"),
        ("zzz", (), "first names are ['model.weight', 'model.bias', 'step']"),
        ("model.", ("--keys", "step"), "first names are ['step']"),
    ],
)
def test_a_prefix_that_no_name_has(prefix: str, more: tuple[str, ...], words: str, shell: Shell, home: Path) -> None:
    """Else all names would keep what was to go, and nobody would be told."""
    said = shell("export", f"{home}:2", "-o", home / "out", "--format", "pt", "--strip", prefix, *more)
    assert said.code == 2 and f"begins with '{prefix}'" in said.err and words in said.err, said.err
    assert not (home / "out").exists()


DOTTED = [
    ({"model": {"module.w": 1, "module.b": 2}}, "model.module.", {"w": 1, "b": 2}),
    ({"model.w": 1, "model.b": 2, "other": 3}, "model.", {"w": 1, "b": 2, "other": 3}),
    ({"m.x": {"w": 1}, "m.y": {"w": 2}}, "m.", {"x": {"w": 1}, "y": {"w": 2}}),
    ({"m": {"a": {"v.w": 1}, "b": [2, 3]}, "n": 4}, "m.", {"a": {"v.w": 1}, "b": [2, 3], "n": 4}),
    ({"m": {"layer_w": 1}}, "m.layer_", {"w": 1}),
    ({"m": [1, 2], "n": 3}, "m.", {0: 1, 1: 2, "n": 3}),
]


def as_tensors(value: Any) -> Any:
    """Numbers become tensors that hold them."""
    if isinstance(value, dict):
        return {key: as_tensors(part) for key, part in value.items()}
    return [as_tensors(part) for part in value] if isinstance(value, list) else torch.tensor([value])


@pytest.mark.parametrize(("saved", "prefix", "wanted"), DOTTED)
def test_a_prefix_goes_and_nothing_with_it(
    saved: dict[str, Any], prefix: str, wanted: dict[Any, Any], shell: Shell, tmp_path: Path
) -> None:
    """Keys have dots themselves, as those of each state_dict of a module."""
    torch.save(as_tensors(saved), tmp_path / "a.pt")
    words = ("--strip", prefix, "--format")
    assert shell("export", tmp_path / "a.pt", "-o", tmp_path / "b.pt", *words, "pt").code == 0
    assert repr(torch.load(tmp_path / "b.pt", weights_only=True)) == repr(as_tensors(wanted))
    assert shell("export", tmp_path / "a.pt", "-o", tmp_path / "d", *words, "dcp").code == 0
    expected = flatten_state_dict(as_tensors(wanted))[0]
    found = read_by_torch(tmp_path / "d", {key: torch.zeros_like(tensor) for key, tensor in expected.items()})
    assert repr(found) == repr(expected)
    assert dcp.FileSystemReader(tmp_path / "d").read_metadata().state_dict_metadata.keys() == expected.keys()


@pytest.mark.parametrize("form", ["pt", "dcp"])
def test_a_prefix_whose_end_would_lose_something(form: str, shell: Shell, tmp_path: Path) -> None:
    for saved, prefix, text in (
        ({"model.w": 1}, "model", "would be '.w'"),
        ({"model": {"w": 1}}, "model", "would be '.w'"),
        ({"model": {"w": 1}, "b": 2}, "model.w", "would be ''"),
        ({"a": 1, "m": {"a": {"b": 2}}}, "m.", "'a.b' cannot be written"),
        ({"m": {"a": {"b": 2}}, "a": 1}, "m.", "'a' cannot be written"),
        ({1: 1, "m": {True: 2}}, "m.", "'True' cannot be written"),
    ):
        torch.save(as_tensors(saved), tmp_path / "a.pt")
        said = shell("export", tmp_path / "a.pt", "-o", tmp_path / "out", "--strip", prefix, "--format", form)
        assert said.code == 1 and text in said.err, said.err
        assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_in_several_files_with_an_index(shell: Shell, tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.full((100,), number) for number in range(5)}
    save_file(tensors, tmp_path / "a.safetensors")
    words = ["--format", "safetensors", "--shard-size", "1700"]
    said = shell.json("export", tmp_path / "a.safetensors", "-o", tmp_path / "out", *words)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(said["files"]) == 4 and index["metadata"]["total_size"] == 4000
    found = {name: load_file(tmp_path / "out" / file)[name] for name, file in index["weight_map"].items()}
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_damage_becomes_no_file(shell: Shell, home: Path, two_ranks: Path, tmp_path: Path) -> None:
    path = step_in(home, 3) / "state.pt"
    flip(path, place_of(path, "data/0"))
    said = shell("export", home, "-o", tmp_path / "out.pt", "--format", "pt")
    assert said.code == 1 and "data/0" in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert shell("export", home / "nothing", "-o", tmp_path / "out.pt", "--format", "pt").code == 3
    for missing in (f"{home}:999", f"{home}:999:state.pt", f"{home}:1:other.pt", f"{two_ranks / 'torch'}:other.pt"):
        said = shell("export", missing, "-o", tmp_path / "out.pt", "--format", "pt")
        assert said.code == 3 and ("999" in said.err or "other.pt" in said.err), said.err
        assert shell("diff", missing, home).code == shell("diff", home, missing, "--values").code == 3
    assert shell("export", f"{home}:1", "-o", tmp_path / "no" / "out.pt", "--format", "pt").code == 5
    assert shell("export", f"{home}:1", "--format", "pt").code == 2


# ---- directories of torch.distributed.checkpoint -----------------------------------------------------------------------


def read_by_torch(directory: Path, state: dict[str, Any]) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no ranks talk to each other is known
        dcp.load(state, checkpoint_id=directory, no_dist=True)
    return state


@pytest.mark.parametrize("which", ["torch", "ours"])
def test_a_sharded_checkpoint_stays_so(which: str, two_ranks: Path, shell: Shell, tmp_path: Path) -> None:
    said = shell.json("export", two_ranks / which, "-o", tmp_path / "d", "--format", "dcp")
    assert (said["tensors"], said["left_out"]) == (2, [])
    assert {path.name for path in (tmp_path / "d").iterdir()} == {"__0_0.distcp", ".metadata"}
    wanted = {"model": {"rows": torch.zeros(7, 6), "columns": torch.zeros(7, 6)}, "epochs": [0, {"lr": 0.0}]}
    found = read_by_torch(tmp_path / "d", wanted)
    assert all(torch.equal(tensor, export_ranks.whole()) for tensor in found["model"].values())
    assert found["epochs"] == [1, {"lr": 0.5}]
    parts = dcp.FileSystemReader(tmp_path / "d").read_metadata().state_dict_metadata
    assert [len(parts[f"model.{name}"].chunks) for name in ("rows", "columns")] == [2, 2]
    assert shell("verify", tmp_path / "d").code == 0
    assert shell("diff", two_ranks / which, tmp_path / "d", "--values").code == 0


def test_all_that_a_state_holds_for_torch(shell: Shell, tmp_path: Path) -> None:
    """And what the tools of torch make of it is what torch makes of its own."""
    parameter = torch.nn.Parameter(torch.randn(3, 4, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    wanted: dict[str, Any] = {
        **{"w": parameter.detach(), "optimizer": optimizer.state_dict(), "view": torch.arange(12).reshape(3, 4).t()[1:]},
        **{"empty": torch.zeros(0, 3), "scalar": torch.tensor(5, dtype=torch.int16), "step": 7, "list": [1, "b"]},
        **{"tensors": [torch.arange(3), 4], "pair": (torch.arange(2), {"a": torch.arange(5)})},
    }
    ckpt.save(wanted, tmp_path / "a.pt", options=options()).result()
    words = ("-o", tmp_path / "ours", "--format", "dcp", "--shard-size", "60")
    assert shell("export", tmp_path / "a.pt", *words).code == 0
    assert len(list((tmp_path / "ours").glob("*.distcp"))) > 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(wanted, checkpoint_id=tmp_path / "torch", no_dist=True)
        for name in ("ours", "torch"):
            dcp_to_torch_save(tmp_path / name, tmp_path / f"{name}.pt")
    found = {name: torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("ours", "torch")}
    assert repr(found["ours"]) == repr(found["torch"])
    assert shell("export", tmp_path / "ours", "-o", tmp_path / "b.safetensors", "--format", "safetensors").code == 0
    assert torch.equal(load_file(tmp_path / "b.safetensors")["view"], wanted["view"])


def test_choices_for_torch(shell: Shell, three_steps: Path, tmp_path: Path) -> None:
    words = ["--format", "dcp", "--keys", "model.*", "--strip", "model.", "--dtype", "float16"]
    assert shell("export", f"{three_steps}:2", "-o", tmp_path / "d", *words).code == 0
    found = read_by_torch(tmp_path / "d", {"weight": torch.zeros(4, 8, dtype=torch.float16)})
    assert torch.equal(found["weight"], state(2)["model"]["weight"].half())


def test_a_directory_that_is_used_stays_as_it_is(shell: Shell, three_steps: Path, home: Path, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "mine").write_text("text")
    said = shell("export", f"{three_steps}:1", "-o", tmp_path / "d", "--format", "dcp")
    assert said.code == 1 and "is no empty directory" in said.err and [*(tmp_path / "d").iterdir()] == [tmp_path / "d" / "mine"]
    (tmp_path / "d" / "mine").unlink()
    path = step_in(home, 3) / "state.pt"
    flip(path, place_of(path, "data/0"))
    assert shell("export", home, "-o", tmp_path / "d", "--format", "dcp").code == 1
    assert sorted(each.name for each in tmp_path.iterdir()) == ["d", "home"] and not [*(tmp_path / "d").iterdir()]
    assert shell("export", f"{home}:1", "-o", tmp_path / "d", "--format", "dcp").code == 0
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    assert shell("export", tmp_path / "list.pt", "-o", tmp_path / "e", "--format", "dcp").code == 1
    assert shell("export", f"{home}:1", "-o", tmp_path / "e.pt", "--format", "pt", "--shard-size", "5GB").code == 2


class InParts:
    """One tensor, of which each row lies in a place of its own."""

    def __init__(self, rows: int, columns: int) -> None:
        self.entries = {"w": Entry(("w",), torch.float32, (rows, columns))}

    def tensor(self, name: str) -> torch.Tensor:
        raise NotImplementedError

    def tensors(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def pieces(self, name: str) -> list[Piece]:
        rows, columns = self.entries["w"].shape or (0, 0)
        return [Piece((row, 0), (1, columns), functools.partial(torch.full, (1, columns), float(row))) for row in range(rows)]

    def value(self, name: str) -> Any:
        raise NotImplementedError


def test_no_more_than_a_part_is_in_memory(ranks: list[Nursery], tmp_path: Path) -> None:
    write_dcp(Chosen(InParts(16, 2 * MiB)), tmp_path / "a", 50 * MiB)
    words = ["export", str(tmp_path / "a"), "-o", str(tmp_path / "out"), "--format", "dcp", "--json"]
    ended = ranks[0].run(f"import export_ranks; export_ranks.export({words!r})")
    said = json.loads(ended.stdout.splitlines()[-1])
    assert said["code"] == 0, ended.stderr
    assert said["grown"] * 1024 < 60 * MiB < 16 * 8 * MiB // 2, "of one tensor of 128 MiB in parts of 8"
    found = read_by_torch(tmp_path / "out", {"w": torch.zeros(16, 2 * MiB)})["w"]
    assert all(bool((found[row] == row).all()) for row in range(16))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_no_more_than_a_tensor_is_in_memory(form: str, ranks: list[Nursery], tmp_path: Path) -> None:
    dcp.save(
        {f"t{number}": torch.full((2 * MiB,), float(number)) for number in range(24)},
        checkpoint_id=tmp_path / "a",
        no_dist=True,
    )
    words = ["export", str(tmp_path / "a"), "-o", str(tmp_path / "out"), "--format", form, "--json"]
    ended = ranks[0].run(f"import export_ranks; export_ranks.export({words!r})")
    said = json.loads(ended.stdout.splitlines()[-1])
    assert said["code"] == 0, ended.stderr
    assert said["grown"] * 1024 < 80 * MiB < 24 * 8 * MiB // 2, "of 192 MiB in tensors of 8"
