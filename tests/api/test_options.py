"""Options: what they accept, what they refuse, and that a refusal names the field."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import DEADLINE_S, options

import ckpt
from ckpt.quantities import parse_size
from ckpt.saving import inspection

SIZES = {
    "0": 0,
    "1": 1,
    "4096": 4096,
    "10b": 10,
    "1k": 1024,
    "1K": 1024,
    "1kb": 1000,
    "1KiB": 1024,
    "512MiB": 512 << 20,
    "512 MiB": 512 << 20,
    "  2 GiB ": 2 << 30,
    "4gib": 4 << 30,
    "4G": 4 << 30,
    "1.5GB": 1_500_000_000,
    "0.5MiB": 1 << 19,
    "2T": 2 << 40,
}


@pytest.mark.parametrize("text", SIZES)
def test_sizes_as_text(text: str) -> None:
    assert parse_size(text) == SIZES[text]


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", "-1GiB", "1 2", "1e9", "4XB", "4 GiBs", "0x10", "1,5GB", "1.GiB", ".5G", "nan"]
)
def test_texts_that_are_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="arena_bytes"):
        parse_size(text, "arena_bytes")


@pytest.mark.parametrize("value", [1.5, None, True, [1], b"1GiB"], ids=repr)
def test_values_that_are_no_sizes(value: Any) -> None:
    with pytest.raises(TypeError, match="arena_bytes"):
        ckpt.Options(arena_bytes=value)


def test_a_negative_size() -> None:
    with pytest.raises(ValueError, match="eager_bytes"):
        ckpt.Options(eager_bytes=-1)


@given(st.integers(0, 1 << 60))
def test_an_int_is_its_own_size(size: int) -> None:
    assert parse_size(size) == size
    assert parse_size(f"{size // 1024}KiB") == size // 1024 * 1024 or size > 1 << 50  # a float holds 53 bits


BAD: dict[str, list[Any]] = {
    "arena_bytes": [0, 1 << 19, (1 << 20) - 1, "1023KiB"],
    "chunk_bytes": [0, 1, 65535, 65537, "96KiB", "3MiB", 1 << 15],
    "writers": [0, -1, 257, 1.5, "4", None, True],
    "record_alignment": [0, -64, 63, 65536, 96, 64.0, "64", True],
    "reuse": ["auto", None, 1],
    "refresh_every": [-1, 2.0, None, "20", True],
    "max_in_flight": [0, -1, 1025, 2.0, None],
    "when_busy": ["", "drop", "WAIT", None, True],
    "max_failed_saves": [-1, 1.5, None, "3"],
    "timeout_s": [0, -1, float("inf"), float("nan"), None, "10", True],
    "drain_timeout_s": [0, -0.1, float("inf"), float("nan"), None, "10", True],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values], ids=repr)
def test_impossible_values(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        ckpt.Options(**{name: value})


@pytest.mark.parametrize("name", ["direct_io", "verify_capture"])
@pytest.mark.parametrize("value", ["no", 2, None], ids=repr)
def test_switches_are_true_or_false(name: str, value: Any) -> None:
    """Else direct_io="off" would switch it on."""
    with pytest.raises((ValueError, TypeError), match=name):
        ckpt.Options(**{name: value})


GOOD: dict[str, list[Any]] = {
    "arena_bytes": [1 << 20, "1MiB", "1GB", 10_000_001],
    "chunk_bytes": ["64KiB", 1 << 16, "1GiB"],
    "writers": [1, 256],
    "eager_bytes": [0, 1, "1GiB"],
    "record_alignment": [None, 1, 64, 32768],
    "max_in_flight": [1, 1024],
    "when_busy": ["wait", "skip"],
    "max_failed_saves": [0, 1, 10**9],
    "timeout_s": [0.001, 1, 1e9],
    "drain_timeout_s": [0.001, 1, 1e9],
    "direct_io": [True, False],
    "verify_capture": [True, False],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in GOOD.items() for value in values], ids=repr)
def test_possible_values(name: str, value: Any) -> None:
    assert name in {field.name for field in dataclasses.fields(ckpt.Options)}
    ckpt.Options(**{name: value})


LONG_ENOUGH = [(name, value) for name, values in GOOD.items() for value in values if "timeout" not in name or value >= 1]


@pytest.mark.parametrize(("name", "value"), LONG_ENOUGH, ids=repr)
def test_possible_values_make_a_right_file(name: str, value: Any, tmp_path: Path) -> None:
    state = {"a": torch.randn(100_000), "b": torch.arange(7)}
    how = options(**({"arena_bytes": "4MiB"} | {name: value}))
    loaded = ckpt.load(ckpt.save(state, tmp_path / "x.pt", lazy=True, options=how).result(DEADLINE_S))
    assert torch.equal(loaded["a"], state["a"]) and torch.equal(loaded["b"], state["b"])


def test_they_are_frozen_comparable_and_picklable() -> None:
    made = ckpt.Options(arena_bytes="2MiB")
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.writers = 3  # type: ignore[misc]
    assert made == ckpt.Options(arena_bytes=2 << 20) and hash(made) == hash(ckpt.Options(arena_bytes=2 << 20))
    assert made != ckpt.Options()
    assert pickle.loads(pickle.dumps(made)) == made
    assert dataclasses.replace(made, writers=1).size("arena_bytes") == 2 << 20


def test_defaults_are_those_of_the_documentation() -> None:
    defaults = ckpt.Options()
    sizes = {name: defaults.size(name) for name in ("arena_bytes", "chunk_bytes", "eager_bytes")}
    assert sizes == {"arena_bytes": 512 << 20, "chunk_bytes": 4 << 20, "eager_bytes": 64 << 10}
    text = ckpt.Options.__doc__ or ""
    for field in dataclasses.fields(ckpt.Options):
        assert f"    {field.name}" in text or f", {field.name}" in text, f"{field.name} is not documented"
        default = field.default if isinstance(field.default, (int, float, bool)) else f'"{field.default}"'
        shown = "None" if field.default is None else f"{default:g}" if isinstance(default, float) else str(default)
        entry = text[text.index(f"{field.name}:") :]
        assert shown in entry[:600], f"the default of {field.name} is {shown}"


def test_the_same_engine_serves_the_same_sizes(tmp_path: Path) -> None:
    """However they are written, and whatever the other options are."""
    for how in (options(arena_bytes="3MiB"), options(arena_bytes=3 << 20, verify_capture=True, eager_bytes=1)):
        ckpt.save([torch.ones(3)], tmp_path / "x.pt", options=how).result(DEADLINE_S)
    assert inspection.engine_count() == 1
    ckpt.save([torch.ones(3)], tmp_path / "x.pt", options=options(arena_bytes="4MiB")).result(DEADLINE_S)
    assert inspection.engine_count() == 2


def test_the_arena_is_as_large_as_asked_for_and_chunks_fit_it() -> None:
    engine = inspection.engine_for(options(arena_bytes="1MiB", chunk_bytes="4MiB"))
    assert engine.arena_bytes == 1 << 20 and engine.chunk_bytes == 1 << 18
    engine = inspection.engine_for(options(arena_bytes="16MiB", chunk_bytes="4MiB"))
    assert engine.arena_bytes == 16 << 20 and engine.chunk_bytes == 4 << 20
