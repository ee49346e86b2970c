"""Pickles as descriptions: what they say is told, and nothing of it is done."""

from __future__ import annotations

import collections
import io
import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt.errors import CorruptError
from ckpt.upkeep import described
from ckpt.upkeep.described import Tree, describe
from ckpt.upkeep.pickles import read_pickle


class Harm:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._path),)


def tree_of(value: Any, protocol: int) -> Tree:
    return describe(read_pickle(pickle.dumps(value, protocol))[0])


VALUE = {
    "none": None,
    "numbers": [1, -1, 300, 70_000, -(1 << 40), 1 << 90, True, False, 1.5],
    "texts": ("", "a", "ü" * 300, b"", b"xyz", bytearray(b"12")),
    "sets": [{1}, frozenset({2})],
    "ordered": collections.OrderedDict(a=1),
    3: {"deep": {"deeper": [(), ((),), {}]}},
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_all_protocols_say_the_same(protocol: int) -> None:
    tree = tree_of(VALUE, protocol)
    found = {leaf.path: leaf.text for leaf in tree.leaves}
    assert [found[f"numbers.{n}"] for n in range(9)] == [repr(value) for value in VALUE["numbers"]]  # type: ignore[index]
    assert found["none"] == "None" and found["ordered.a"] == "1" and found["texts.1"] == "'a'" and "3.deep.deeper.2" in found
    assert tree.foreign == []


def test_nothing_is_run(tmp_path: Path) -> None:
    tree = tree_of({"a": Harm(tmp_path / "harm"), "b": 1}, 4)
    assert tree.foreign == ["posix.mkdir"] and not (tmp_path / "harm").exists()
    assert [(leaf.path, leaf.kind) for leaf in tree.leaves if leaf.path in ("a", "b")] == [("a", "call"), ("b", "int")]
    pickle.loads(pickle.dumps(Harm(tmp_path / "harm")))
    assert (tmp_path / "harm").exists(), "else the test would show nothing"


MADE_TO_DO_HARM = {
    "memo": b"Nr\xff\xff\xff\xff.",
    "length": b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
    "negative": b"\x8b\xff\xff\xff\xff",
    "nested keys": b"}" + b"N" + b"\x85" * 30_000 + b"Ns.",
    "nested lists": b"]" * 30_000 + b"a" * 29_999 + b".",
    "itself": b"]q\x00h\x00a.",
    "call of a call": b"N" + b")R" * 100_000 + b".",
    "long text": b"I" + b"9" * 100_000 + b"\n.",
    "doubling": b"K\x01" + b"2\x86" * 60 + b".",
    "parameters": b"ctorch._utils\n_rebuild_parameter\nq\x00N" + b"\x85h\x00" * 0 + b".",
    "no end": b"]",
    "nothing": b"",
    "empty stack": b"0.",
}


@pytest.mark.parametrize("content", MADE_TO_DO_HARM.values(), ids=MADE_TO_DO_HARM.keys())
def test_what_is_made_to_do_harm_costs_what_its_length_costs(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(described, "_MOST_VISITS", 10_000)
    try:
        tree = describe(read_pickle(content)[0])
    except CorruptError as error:
        assert "cannot be understood" in str(error)
    else:
        assert len(tree.leaves) <= 10_000


@pytest.mark.parametrize("rounds", [60, pytest.param(30_000, marks=pytest.mark.slow)])
def test_whatever_the_bytes_are_the_answer_is_one_of_two(rounds: int) -> None:
    file = io.BytesIO()
    torch.save({"w": torch.nn.Parameter(torch.zeros(2)), "o": torch.optim.SGD([torch.zeros(1)], lr=1).state_dict()}, file)
    sound = zipfile.ZipFile(file).read("archive/data.pkl")
    chance = random.Random(5)
    refused = 0
    for _ in range(rounds):
        content = bytearray(sound)
        for _ in range(chance.randint(1, 4)):
            content[chance.randrange(len(content))] = chance.randrange(256)
        try:
            describe(read_pickle(bytes(content))[0])
        except CorruptError:
            refused += 1
    assert 0 < refused < rounds
