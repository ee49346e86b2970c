"""Files against safetensors.torch.save_file: the same bytes, and the same refusals before anything is written."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support import options, wait_until

import ckpt
from ckpt.errors import CaptureError, UnsupportedError
from ckpt.safetensors_header import RANKS

safetensors = pytest.importorskip("safetensors.torch")

DTYPES = list(RANKS)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
LARGE = 40_000  # elements: more bytes than options() copies inside save()


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Of any bytes, but for booleans."""
    count = int(torch.Size(shape).numel())
    if dtype is torch.bool:
        return torch.randint(0, 2, shape).bool()
    return torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8).view(dtype).view(shape)


def theirs(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> bytes:
    safetensors.save_file(tensors, path, metadata)
    return path.read_bytes()


def ours(tensors: Any, path: Path, metadata: dict[str, str] | None = None, **how: Any) -> bytes:
    lazy = how.pop("lazy", None)
    pending = ckpt.save(tensors, path, metadata=metadata, lazy=lazy, options=options(**how))
    ckpt.fence()
    return pending.result(30).read_bytes()


# ---- the same bytes --------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    names=st.lists(NAMES, max_size=9, unique=True),
    forms=st.lists(st.tuples(st.sampled_from(DTYPES), SHAPES), min_size=9, max_size=9),
    large=st.lists(st.booleans(), min_size=9, max_size=9),
    metadata=st.one_of(st.none(), st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), NAMES, max_size=1)),
    lazy=st.booleans(),
    direct=st.booleans(),
    verify=st.booleans(),
)
def test_the_bytes_are_those_of_save_file(
    tmp_path: Path, names: list[str], forms: Any, large: list[bool], metadata: Any, lazy: bool, direct: bool, verify: bool
) -> None:
    assume(names or metadata != {})  # of nothing at all save_file makes a file that it cannot read
    tensors = {}
    for name, (dtype, shape), is_large in zip(names, forms, large, strict=False):
        shape = shape if shape or "float4" not in str(dtype) else (2,)
        tensors[name] = random_tensor(dtype, (LARGE + len(tensors),) if is_large else shape)
    expected = theirs(tensors, tmp_path / "theirs", metadata)
    how = {"lazy": lazy, "direct_io": direct, "verify_capture": verify}
    assert ours(tensors, tmp_path / "ours.safetensors", metadata, **how) == expected


def test_every_dtype_has_its_place(tmp_path: Path) -> None:
    tensors = {str(dtype): random_tensor(dtype, (3, 2)) for dtype in reversed(DTYPES)}
    assert ours(tensors, tmp_path / "a.safetensors") == theirs(tensors, tmp_path / "b")


def test_many_names(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.weight": torch.full((i % 7,), float(i)) for i in range(3000)}
    assert ours(tensors, tmp_path / "a.safetensors", lazy=True) == theirs(tensors, tmp_path / "b")


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("chunk", ["64KiB", "1MiB"])
def test_views_leave_from_their_places(tmp_path: Path, lazy: bool, chunk: str) -> None:
    whole = torch.randn(20, LARGE)
    odd = torch.randint(0, 256, (3 * LARGE + 7,), dtype=torch.uint8)
    tensors = {
        "end": whole[12:], "begin": whole[:5], "row": whole[7], "empty": whole[6:6], "odd": odd[3:-1], "alone": odd[:1],
    }  # fmt: skip
    found = ours(tensors, tmp_path / "a.safetensors", lazy=lazy, chunk_bytes=chunk)
    assert found == theirs(tensors, tmp_path / "b")


def test_what_transformers_and_accelerate_give(tmp_path: Path) -> None:
    """Parameters, an OrderedDict, one entry of metadata."""
    model = torch.nn.Sequential(torch.nn.Linear(200, 300), torch.nn.BatchNorm1d(300))
    for state in (model.state_dict(), dict(model.named_parameters()), OrderedDict(model.state_dict(keep_vars=True))):
        found = ours(state, tmp_path / "a.safetensors", {"format": "pt"})
        assert found == theirs(dict(state), tmp_path / "b", {"format": "pt"})
    assert safetensors.load_model(model, tmp_path / "a.safetensors", strict=False)[1] == []


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_module_is_saved_as_by_save_model(tmp_path: Path, metadata: Any) -> None:
    """With tied weights, of which one is saved, and another that is not contiguous."""
    model = torch.nn.Sequential(torch.nn.Embedding(50, 300), torch.nn.Linear(300, 50, bias=False), torch.nn.Linear(7, 9))
    model[1].weight = model[0].weight
    model[2].weight = torch.nn.Parameter(torch.randn(7, 9).t())
    safetensors.save_model(model, str(tmp_path / "b"), None if metadata is None else dict(metadata))
    found = ours(model, tmp_path / "a.safetensors", metadata)
    with (
        safetensors.safe_open(tmp_path / "a.safetensors", "pt") as ours_,
        safetensors.safe_open(tmp_path / "b", "pt") as theirs_,
    ):
        assert ours_.metadata() == theirs_.metadata() == {"1.weight": "0.weight", **(metadata or {})}
    if metadata is None:  # else theirs has the two in any order
        assert found == (tmp_path / "b").read_bytes()


def test_metadata_keeps_its_order(tmp_path: Path) -> None:
    """That of save_file is another one each time."""
    metadata = {str(i): f"é\n{i}" for i in (5, 3, 9, 1)}
    ours({"a": torch.ones(3)}, tmp_path / "a.safetensors", metadata)
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == metadata
    head = (tmp_path / "a.safetensors").read_bytes()
    assert [head.index(f'"{key}"'.encode()) for key in metadata] == sorted(head.index(f'"{key}"'.encode()) for key in metadata)


def test_a_link_to_a_file_of_another_name(tmp_path: Path) -> None:
    """As in a cache of Hugging Face."""
    (tmp_path / "blob").write_bytes(b"old")
    (tmp_path / "a.safetensors").symlink_to("blob")
    found = ours({"a": torch.ones(3)}, tmp_path / "a.safetensors")
    assert found == (tmp_path / "blob").read_bytes() == theirs({"a": torch.ones(3)}, tmp_path / "b")


def test_conjugates_are_resolved(tmp_path: Path) -> None:
    """save_file writes the bytes of what they are views of."""
    values = torch.randn(LARGE, dtype=torch.complex64)
    found = ours({"a": values.conj()}, tmp_path / "a.safetensors", lazy=True)
    assert found == theirs({"a": values.conj().resolve_conj()}, tmp_path / "b")


# ---- refusals --------------------------------------------------------------------------------------------------------


class Wrapper(torch.Tensor):
    """Without memory of its own, as a DTensor."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if "detach" in str(func) or "alias" in str(func) else NotImplemented


def _tied() -> dict[str, torch.Tensor]:
    weight = torch.ones(4)
    return {"a": weight, "b": weight, "c": torch.ones(2)}


def _crossed() -> dict[str, torch.Tensor]:
    weight = torch.ones(40)
    return {"a": weight[:20], "b": weight[19:]}


def _halves() -> torch.nn.Module:
    module = torch.nn.Linear(2, 2)
    memory = torch.ones(5)
    module.a, module.b = torch.nn.Parameter(memory[:3]), torch.nn.Parameter(memory[2:])
    return module


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "list": (lambda: [torch.ones(2)], "a list"),
    "half_of_each": (lambda: _halves(), "clone()"),
    "nested": (lambda: {"a": torch.ones(2), "model": {"b": torch.ones(2)}}, "'model' is a dict"),
    "number": (lambda: {"step": 5}, "'step' is a int"),
    "key": (lambda: {1: torch.ones(2)}, "1 is no name"),
    "metadata": (lambda: {"__metadata__": torch.ones(2)}, "is no name"),
    "surrogate": (lambda: {"a\ud800": torch.ones(2)}, "surrogate"),
    "dtype": (lambda: {"a": torch.ones(2, dtype=torch.complex128)}, "torch.complex128"),
    "sparse": (lambda: {"a": torch.eye(2).to_sparse()}, "to_dense()"),
    "strides": (lambda: {"a": torch.ones(2, 3).t()}, "contiguous()"),
    "meta": (lambda: {"a": torch.ones(2, device="meta")}, "meta"),
    "lazy_parameter": (lambda: torch.nn.LazyLinear(2).state_dict(), "not initialized"),
    "wrapper": (lambda: {"a": Wrapper(torch.ones(2))}, "without memory of its own"),
    "tied": (_tied, "'a', 'b'"),
    "crossed": (_crossed, "'a', 'b'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    make, text = REFUSED[name]
    (tmp_path / "a.safetensors").write_bytes(b"old")
    with pytest.raises(UnsupportedError) as caught:
        ckpt.save(make(), tmp_path / "a.safetensors", options=options())
    assert text in str(caught.value) and f"'{tmp_path / 'a.safetensors'}'" in str(caught.value)
    assert os.listdir(tmp_path) == ["a.safetensors"] and (tmp_path / "a.safetensors").read_bytes() == b"old"


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(areas=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 4)), min_size=1, max_size=6))
def test_shared_memory_is_refused_where_save_file_refuses_it(tmp_path: Path, areas: list[tuple[int, int]]) -> None:
    whole = torch.arange(16.0)
    tensors = {str(i): whole[begin : begin + size] for i, (begin, size) in enumerate(areas)}
    try:
        expected = theirs(tensors, tmp_path / "b")
    except RuntimeError:
        with pytest.raises(UnsupportedError, match="shares memory"):
            ckpt.save(tensors, tmp_path / "a.safetensors", options=options())
    else:
        assert ours(tensors, tmp_path / "a.safetensors") == expected


def test_metadata_of_other_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="put it into the object"):
        ckpt.save({"a": torch.ones(2)}, tmp_path / "a.pt", metadata={"a": "b"})
    with pytest.raises(TypeError, match="not 'a': 1"):
        ckpt.save({"a": torch.ones(2)}, tmp_path / "a.safetensors", metadata={"a": 1})  # type: ignore[dict-item]
    assert os.listdir(tmp_path) == []


# ---- lazy ------------------------------------------------------------------------------------------------------------


def test_a_step_right_behind_the_save(tmp_path: Path, native: Any) -> None:
    """Nothing has left yet, since the file is still being made: the fence before the step keeps all of it."""
    model = torch.nn.Linear(400, 300)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    path = tmp_path / "a.safetensors"
    for _ in range(3):
        model(torch.randn(4, 400)).sum().backward()
        optimizer.step()
        expected = theirs(model.state_dict(), tmp_path / "b")
        native.set_fault("fallocate", path.name, delay_s=60)
        pending = ckpt.save(model.state_dict(), path, options=options())
        model(torch.randn(4, 400)).sum().backward()
        optimizer.step()
        native.clear_faults()
        assert pending.result(30).read_bytes() == expected
        assert pending.stats.bytes_copied_at_fence > 400 * 300 * 3


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("counted", [False, True])
def test_a_write_without_a_fence_fails_the_save(tmp_path: Path, native: Any, verify: bool, counted: bool) -> None:
    path = tmp_path / "a.safetensors"
    native.set_fault("fallocate", path.name, delay_s=60)
    weights, other = torch.ones(LARGE), torch.ones(7)
    pending = ckpt.save({"weights": weights, "other": other}, path, lazy=True, options=options(verify_capture=verify))
    if counted:
        weights.add_(1)
    else:
        weights.numpy()[:] += 1  # moves no version counter: the witnesses find it
    native.clear_faults()
    error = pending.exception(30)
    assert isinstance(error, CaptureError) and "weights" in str(error) and "fence" in str(error)
    wait_until(lambda: os.listdir(tmp_path) == [], 5, "the removal of the unfinished file")


def test_large_tensors_are_not_copied_inside_save(tmp_path: Path) -> None:
    tensors = {name: torch.randn(10 * LARGE) for name in "abc"} | {"scale": torch.ones(3)}
    pending = ckpt.save(tensors, tmp_path / "a.safetensors", lazy=True, options=options())
    stats = pending.stats
    ckpt.fence()
    pending.result(30)
    assert stats.bytes_copied_in_save < 20_000
