"""`ckpt diff`: structure and values, across formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from command_line import Shell, step_in
from test_verify import flip, place_of

from ckpt.upkeep import described


def saved(path: Path, **changes: Any) -> Path:
    torch.save({"w": torch.arange(6.0), "n": torch.arange(3), "nan": torch.tensor([float("nan")]), "lr": 0.1, **changes}, path)
    return path


def test_the_same(shell: Shell, tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a.pt"), saved(tmp_path / "b.pt")
    for words in ((), ("--values",)):
        document = shell.json("diff", a, b, *words)
        assert document["same"] and document["alike"] == 4
    assert "values of tensors were not compared" in shell("diff", a, b).out


def test_structure(shell: Shell, tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a.pt", gone=1), saved(tmp_path / "b.pt", new=torch.zeros(1), w=torch.zeros(6).half(), lr=0.2)
    for words in ((), ("--values",)):
        document = shell.json("diff", a, b, *words, code=1)
        assert (document["only_a"], document["only_b"]) == (["gone"], ["new"])
        assert {each["name"]: (each["a"], each["b"]) for each in document["changed"]} == {
            "w": ("float32 [6]", "float16 [6]"),
            "lr": ("0.1", "0.2"),
        }
    said = shell("diff", a, b)
    assert said.code == 1 and {"- gone", "+ new"} <= {*said.out.splitlines()}


UNLIKE: list[tuple[Any, Any]] = [
    ("x" * 100 + "a", "x" * 100 + "b"),
    (b"x" * 100 + b"a", b"x" * 100 + b"b"),
    (bytearray(b"1"), bytearray(b"2")),
    (1 << 2000, 1 << 2000 | 1),
    ({1, 2, 3}, {1, 2, 4}),
    (frozenset({"a"}), frozenset({"b"})),
    (torch.Size([1, 2]), torch.Size([1, 3])),
    (complex(1, 2), complex(1, 3)),
    ({frozenset({(1, "a")})}, {frozenset({(1, "b")})}),
]


@pytest.mark.parametrize(
    ("one", "other"), UNLIKE, ids=[f"{number}-{type(one).__name__}" for number, (one, _) in enumerate(UNLIKE)]
)
def test_also_what_is_not_shown_of_a_value_is_compared(one: Any, other: Any, shell: Shell, tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a.pt", v=one), saved(tmp_path / "b.pt", v=other)
    (changed,) = shell.json("diff", a, b, code=1)["changed"]
    assert changed["name"].partition(".")[0] == "v"
    assert shell.json("diff", a, saved(tmp_path / "c.pt", v=one))["same"]


def test_what_is_called_the_same_does_not_hide_each_other(shell: Shell, tmp_path: Path) -> None:
    a = saved(tmp_path / "a.pt", **{"x.y": 1, "x": {"y": 2}, "z": {1: 1, "1": 2}})
    b = saved(tmp_path / "b.pt", **{"x.y": 0, "x": {"y": 2}, "z": {1: 0, "1": 2}})
    assert [each["name"] for each in shell.json("diff", a, b, code=1)["changed"]] == ["x.y", "z.1"]


def test_of_what_nobody_would_look_at_nothing_is_said(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = saved(tmp_path / "a.pt", v=1), saved(tmp_path / "b.pt", v=2)
    monkeypatch.setattr(described, "_MOST_VISITS", 3)
    said = shell("diff", a, b)
    assert said.code == 1 and "more paths than anybody would look at" in said.err


def test_values(shell: Shell, tmp_path: Path) -> None:
    w = torch.arange(6.0)
    w[2] += 0.25
    a = saved(tmp_path / "a.pt", big=torch.tensor([2**62, 1]), flag=torch.tensor([True]))
    b = saved(tmp_path / "b.pt", w=w, nan=torch.tensor([1.0]), big=torch.tensor([-(2**62), 1]), flag=torch.tensor([False]))
    assert shell("diff", a, b).code == 0
    document = shell.json("diff", a, b, "--values", code=1)
    assert {each["name"]: (each["largest"], each["elements"]) for each in document["distances"]} == {
        **{"w": (0.25, 1), "nan": (None, 1), "big": (float(2**63), 1), "flag": (1.0, 1)}
    }
    assert "NaN on one side" in shell("diff", a, b, "--values").out


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_across_formats(shell: Shell, tmp_path: Path) -> None:
    state = {"m": {"w": torch.arange(6.0)}, "epoch": 3, "betas": [0.9, (1, "a")], "list": [torch.zeros(1), 5]}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    torch.save(state, tmp_path / "a.pt")
    torch.save({**state, "betas": [0.9, (1, "b")]}, tmp_path / "b.pt")
    for one, other in (("dcp", "a.pt"), ("a.pt", "dcp")):
        assert shell.json("diff", tmp_path / one, tmp_path / other)["alike"] == 5
        assert shell.json("diff", tmp_path / one, tmp_path / other, "--values")["alike"] == 5
    document = shell.json("diff", tmp_path / "dcp", tmp_path / "b.pt", "--values", code=1)
    assert (document["only_a"], document["only_b"]) == (["betas"], ["betas.0", "betas.1.0", "betas.1.1"])


def test_checkpoints_and_what_is_damaged(shell: Shell, home: Path, tmp_path: Path) -> None:
    document = shell.json("diff", f"{home}:1", f"{home}:3", "--values", code=1)
    assert [each["name"] for each in document["changed"]] == ["step"]
    assert [(each["name"], each["largest"]) for each in document["distances"]] == [("model.weight", 2.0)]
    path = step_in(home, 3) / "state.pt"
    flip(path, place_of(path, "data/0"))
    said = shell("diff", f"{home}:1", f"{home}:3", "--values")
    assert said.code == 1 and "data/0" in said.err and said.out == ""
    assert shell("diff", home, tmp_path / "nothing").code == 3
