"""What is asked of torch's libraries, past the methods of tensors: it is what these would say, or they are asked."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from places import PYTHONPATH
from support import patience

from ckpt import torch_private
from ckpt.plan import pickler

SYMBOLS = torch_private._SYMBOLS


@pytest.fixture(autouse=True)
def needs_calls() -> None:
    if not pickler.make_state_pickler().calls_directly:
        pytest.skip(f"the libraries of torch {torch.__version__} do not answer as those that were tested")


def dumped(obj: Any, made: Any = None) -> bytes | None:
    """By the native pickler; None if it declines."""
    table = pickler.StorageTable({})
    asked: dict[str, Any] = {"records": table.records, "order": table.order, "remaps": {}, "reduce": table.reducer_override}
    data: bytes | None = (made or pickler.state_pickler).dump(obj, **asked)
    return data


def plain_ones() -> list[torch.Tensor]:
    learns = torch.zeros(2, 3, requires_grad=True)
    parameter = torch.nn.Parameter(torch.ones(4, 5))
    parameter.grad = torch.ones(4, 5)
    moved = torch.nn.Parameter(torch.ones(3)).data
    moved.set_(torch.arange(6.0).untyped_storage(), 2, (2, 2), (2, 1))
    grown = torch.ones(3).resize_(7)
    with torch.inference_mode():
        inferred = torch.ones(3) * 2
    swapped, other = torch.ones(3), torch.zeros(5, dtype=torch.int16)
    torch.utils.swap_tensors(swapped, other)
    made = [torch.empty(3, dtype=dtype) for dtype, (named, _) in pickler.CLASSES.items() if named is not None]
    others = [torch.ones(()), torch.ones(0, 4), torch.ones(3, 4).t(), torch.ones(2, 2, 2, 2, 2, 2, 2), torch.ones(9)[3:6]]
    return [learns, learns * 2, learns.detach(), parameter.grad, moved, grown, inferred, swapped, other, *others, *made]


def test_they_answer_as_methods_do() -> None:
    for tensor in plain_ones():
        expected = pickler.dump_in_python([tensor], {})[0]
        assert dumped([tensor]) == expected == dumped([tensor], pickler.make_state_pickler(calls=False))


@pytest.mark.filterwarnings("ignore")
def test_what_is_more_than_its_memory_is_left_to_torch() -> None:
    hooked = torch.ones(3, requires_grad=True)
    hooked.register_hook(lambda gradient: gradient)
    noted = torch.ones(3)
    noted.note = "hello"  # type: ignore[attr-defined]
    square = torch.eye(3)
    kinds = [hooked, noted, square.to_sparse(), square.to_sparse_csr(), torch.nested.nested_tensor([square, square]),
             torch.quantize_per_tensor(square, 0.1, 0, torch.qint8), torch.ones(3, dtype=torch.complex64).conj(),
             torch.ones(3, dtype=torch.complex64).conj().imag, torch.ones(2, device="meta")]  # fmt: skip
    for tensor in kinds:
        assert dumped([torch.ones(2), tensor]) is None


def test_attributes_that_are_gone_again_are_none() -> None:
    tensor = torch.ones(3)
    tensor.note = "hello"  # type: ignore[attr-defined]
    del tensor.note  # type: ignore[attr-defined]
    handle = tensor.requires_grad_().register_hook(lambda gradient: gradient)
    handle.remove()
    assert dumped([tensor]) == pickler.dump_in_python([tensor], {})[0]


# ---- another torch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_without_one_of_them_methods_are_asked(symbol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SYMBOLS, symbol, "no_such_symbol")
    assert not pickler.make_state_pickler().calls_directly


@pytest.mark.parametrize(
    ("one", "other"), [("is_neg", "is_conj"), ("storage_offset", "storage_size"), ("layout", "dtype"), ("dtype", "layout")]
)
def test_one_that_means_something_else_is_not_used(one: str, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SYMBOLS, one, SYMBOLS[other])
    made = pickler.make_state_pickler()
    assert not made.calls_directly
    assert dumped(plain_ones(), made) == pickler.dump_in_python(plain_ones(), {})[0]


def test_libraries_that_torch_has_not_loaded_are_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_private, "_LIBRARIES", ("libtorch_of_another_place.so", "libm.so.6"))
    assert not pickler.make_state_pickler().calls_directly


@pytest.mark.parametrize("what", ["_cdata", "_backward_hooks"])
def test_without_a_private_attribute_methods_are_asked(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, what, property(lambda self: 4096))
    assert not pickler.make_state_pickler().calls_directly


@pytest.mark.parametrize("kind", [torch.Tensor, torch.nn.Parameter])
@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("layout", property(lambda self: torch.sparse_coo)),
        ("dtype", property(lambda self: torch.int32)),
        ("storage_offset", lambda self: 0 if type(self) is not torch.Tensor else 1),
        ("is_neg", lambda self: True),
        ("is_conj", lambda self: True),
        ("is_nested", property(lambda self: True)),
        ("requires_grad", property(lambda self: True)),
        ("_backward_hooks", property(lambda self: {1: print})),
    ],
)
def test_what_a_class_has_instead_is_asked(name: str, instead: Any, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.ones(3, dtype=torch.complex64 if name == "is_conj" else None)
    before, parameter_before = dumped([tensor]), dumped([torch.nn.Parameter(tensor)])
    assert before is not None and parameter_before is not None
    with monkeypatch.context() as patch:
        patch.setattr(kind, name, instead, raising=False)
        slowly = pickler.make_state_pickler(calls=False)
        assert not pickler.make_state_pickler().calls_directly or kind is torch.nn.Parameter
        assert dumped([tensor]) == dumped([tensor], slowly)
        assert (dumped([tensor]) == before) == (kind is torch.nn.Parameter)
    assert dumped([tensor]) == before


def test_nothing_is_printed_and_other_modes_are_right() -> None:
    """In processes that have a default device, or import this where no gradients are recorded."""
    program = (
        "import torch\n{before}\nimport ckpt\nfrom ckpt.plan import pickler\n"
        "assert pickler.make_state_pickler().calls_directly\n"
        "t = {{'a': torch.ones(3, device='cpu'), 'b': torch.eye(2, device='cpu').to_sparse()}}\n"
        "assert pickler.pickle_object(t)[0] == pickler.dump_in_python(t, {{}})[0]\n"
    )
    for before in (
        "",
        "torch.set_default_device('meta')",
        "torch.set_grad_enabled(False)",
        "torch.set_default_dtype(torch.float64)",
    ):
        command = [sys.executable, "-W", "error", "-c", program.format(before=before)]
        found = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": PYTHONPATH}, timeout=patience(100))
        assert (found.returncode, re.sub(r"\s", "", found.stdout + found.stderr)) == (0, "")
