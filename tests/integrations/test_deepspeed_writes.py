"""DeepSpeed's own ways to write to parameters and to the optimizer's state: what was saved before holds what was there."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import types
from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)
if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed", allow_module_level=True)

from dist.deepspeed_runs import Fields, Outcomes

from ckpt.integrations.deepspeed.wrapping import wrap_function

pytestmark = pytest.mark.usefixtures("native")

ZERO = ({"stage": 1}, {"stage": 2}, {"stage": 3})
EARLY: Fields = {"engine": "attach"}  # the parameters have their methods before anything is enabled
MUON: Fields = {"variant": "pipeline", "stage": 1, "muon": True}


def case(way: str, **fields: Any) -> Fields:
    given = {"precision": "bf16", "engine": "enable"} | fields
    words = [str(value) if name in ("engine", "precision", "variant") else f"{name}={value}" for name, value in given.items()]
    return {"name": " ".join([way, *words]), "mode": "written", "tags": [way]} | given


CASES = [
    case("by_the_parameter", **EARLY, **ZERO[0]),  # first: whatever is enabled stays so
    *(case("full_parameters", **zero) for zero in ZERO),
    *(case("full_state", **zero) for zero in ZERO),
    case("by_the_parameter", **ZERO[1]),
    case("fragments", **ZERO[0]),
    case("local_parameters", **ZERO[2]),
    case("local_state", **ZERO[2]),
    *(case("refresh", **zero) for zero in ZERO),
    *(case("optimizer_state", **zero) for zero in ({"stage": 0}, *ZERO)),
    *(case("module_state", **zero) for zero in ({"stage": 0}, *ZERO[:2])),
    case("gathered", precision="fp32", **ZERO[2]),
    case("universal", **ZERO[0]),
    *(case("own_step", muon=True, **zero) for zero in ZERO),
    *(case("whole_step", precision=precision, **MUON) for precision in ("fp32", "fp16", "bf16")),
]
OWN_ADAM = [case("own_step", muon=True, own_adam=True, **zero) for zero in ZERO]  # DeepSpeed compiles it when it is first used
NAMES: Fields = {"name": "names", "mode": "unfenced", "engine": "enable", "stage": 1}


class Writes(Outcomes):
    module = "deepspeed_writes"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return Writes(tmp_path_factory.mktemp("writes"), 2, [*CASES, NAMES])


@pytest.fixture(scope="module")
def own_adam(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return Writes(tmp_path_factory.mktemp("adam"), 2, OWN_ADAM)


@pytest.mark.parametrize("name", [fields["name"] for fields in CASES])
def test_what_writes_to_the_state_waits_for_what_was_saved(name: str, ranks: Outcomes) -> None:
    assert_fenced(ranks[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", [fields["name"] for fields in OWN_ADAM])
def test_so_does_a_step_with_an_optimizer_that_deepspeed_compiles(name: str, own_adam: Outcomes) -> None:
    assert_fenced(own_adam[name])


def assert_fenced(found: list[Fields]) -> None:
    assert any(rank["changed"] and rank["files"] for rank in found), "nothing was written to"
    for rank in found:
        assert (rank["raised"], rank["wait"], rank["differences"]) == (None, None, [])
        assert not rank["changed"] or rank["captured"] == [True]


def test_no_name_leads_past_the_fence(ranks: Outcomes) -> None:
    """Nor has DeepSpeed given another name to what is to be fenced."""
    for found in ranks["names"]:
        assert found["left"] == []


# ---- what is put around a function -----------------------------------------------------------------------------------

Wrapped = Callable[..., Any]


def add(self: int, first: int = 10, *, second: int = 100) -> int:
    """Adds."""
    return self + first + second


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """With a function of its own, `add`."""
    made = types.ModuleType("somebody_elses")
    fresh = types.FunctionType(add.__code__, vars(made), "add", add.__defaults__)
    fresh.__kwdefaults__, fresh.__doc__ = add.__kwdefaults__, add.__doc__
    made.add = fresh  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made


def doubled(stock: Wrapped) -> Wrapped:
    return lambda *args, **kwargs: 2 * stock(*args, **kwargs)


def test_all_that_hold_a_function_come_to_what_is_around_it(module: Any) -> None:
    imported, bound, signature = module.add, types.MethodType(module.add, 1), inspect.signature(module.add)
    wrap_function(module.__name__, "add", doubled)
    assert (imported(1), bound(), bound(2, second=3), module.add(1, first=2, second=3)) == (222, 222, 12, 12)
    assert (inspect.signature(imported), imported.__name__, imported.__doc__) == (signature, "add", "Adds.")
    with pytest.raises(TypeError, match="third"):
        imported(1, third=3)


def test_a_function_that_somebody_else_has_wrapped(module: Any) -> None:
    inner = module.add
    module.add = wraps(inner)(lambda *args: -inner(*args))
    wrap_function(module.__name__, "add", doubled)
    assert (inner(1), module.add(1)) == (222, -222)


def test_a_function_with_variables_of_another(module: Any) -> None:
    hundred = 100
    module.add = lambda first: first + hundred
    wrap_function(module.__name__, "add", doubled)
    assert module.add(1) == 202


def test_what_is_not_there_is_left_out(module: Any) -> None:
    wrap_function(module.__name__, "subtract", doubled)
    wrap_function("no_such_module", "add", doubled)
    assert not hasattr(module, "subtract")
