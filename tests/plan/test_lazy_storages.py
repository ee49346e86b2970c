"""Which tensors leave lazily: those of optimizers that have stepped, those declared, and never any other."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import DEADLINE_S, assert_same, clear_faults, options

import ckpt
from ckpt.plan.lazy_storages import ALL, lazy_storages
from ckpt.plan.save_plan import COPY, LAZY, make_plan
from ckpt.saving import inspection


def is_lazy(tensor: torch.Tensor, declared: Any = None) -> bool:
    return are_lazy([tensor], declared)[0]


def are_lazy(tensors: list[torch.Tensor], declared: Any = None) -> list[bool]:
    found = lazy_storages(declared)(None)
    if isinstance(found, bool) or ALL in found:
        return [bool(found)] * len(tensors)
    return [tensor.untyped_storage()._cdata in found for tensor in tensors]


def lazy_names(state: dict[str, torch.Tensor], declared: Any = None) -> list[str]:
    """What a save of `state` would leave where it is."""
    return [name for name, tensor in state.items() if list(make_plan(tensor, lazy_storages(declared), 0).kinds) == [LAZY]]


def stepped(*tensors: torch.Tensor, kind: Any = torch.optim.SGD, **how: Any) -> torch.optim.Optimizer:
    optimizer = kind(tensors, lr=0.1, **how)
    for tensor in tensors:
        tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    return optimizer


def parameter(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(*shape))


# ---- optimizers ------------------------------------------------------------------------------------------------------


def test_nothing_is_lazy_before_the_first_step() -> None:
    weight = parameter(10)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    assert not is_lazy(weight)
    weight.grad = torch.ones(10)
    optimizer.step()
    assert is_lazy(weight)


def test_parameters_and_state_of_an_optimizer_are_lazy() -> None:
    weight, other = parameter(10), torch.randn(10)
    optimizer = stepped(weight, kind=torch.optim.AdamW)
    state = optimizer.state[weight]
    found = lazy_names(
        {"weight": weight, "detached": weight.detach(), "turned": weight.view(2, 5).t(), **state, "other": other}
    )
    assert found == ["weight", "detached", "turned", "step", "exp_avg", "exp_avg_sq"]


def test_parameters_without_a_gradient_and_later_groups_are_lazy() -> None:
    weight, frozen, late = parameter(3), parameter(3), parameter(3)
    optimizer = stepped(weight)
    optimizer.param_groups[0]["params"].append(frozen)
    optimizer.add_param_group({"params": [late]})
    assert is_lazy(weight) and is_lazy(frozen) and is_lazy(late)


def test_state_that_the_optimizer_replaces_stays_lazy() -> None:
    weight = parameter(10)
    optimizer = stepped(weight, kind=torch.optim.AdamW)
    old = optimizer.state[weight]["exp_avg"]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    new = optimizer.state[weight]["exp_avg"]
    assert new is not old and is_lazy(new) and not is_lazy(old)


def test_lists_in_the_state_are_lazy() -> None:
    weight = parameter(4)
    optimizer = torch.optim.LBFGS([weight], max_iter=4, history_size=3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (weight**4).sum()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    state = optimizer.state[weight]
    assert state["old_dirs"] and all(is_lazy(direction) for direction in state["old_dirs"])


def test_an_optimizer_that_is_gone_makes_nothing_lazy() -> None:
    weight = parameter(10)
    optimizer = stepped(weight)
    gone = weakref.ref(optimizer)
    known = inspection.known_optimizers()
    del optimizer
    gc.collect()
    assert gone() is None and not is_lazy(weight)
    assert inspection.known_optimizers() < known


def test_many_short_lived_optimizers_leave_nothing_behind() -> None:
    gc.collect()
    known = inspection.known_optimizers()
    for _ in range(200):
        stepped(parameter(2))
    gc.collect()
    assert inspection.known_optimizers() <= known


def test_an_address_used_again_is_not_lazy_again() -> None:
    """The memory of a lazy tensor that is gone may go to a tensor that is none."""
    for _ in range(50):
        optimizer = stepped(torch.nn.Parameter(torch.ones(1000)))
        del optimizer
        fresh = torch.ones(1000)
        assert not is_lazy(fresh)


def test_a_step_that_fails_makes_lazy_what_it_may_have_written() -> None:
    weight = parameter(3)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert is_lazy(weight)


def test_buffers_of_a_model_in_training_are_not_lazy() -> None:
    model = torch.nn.BatchNorm1d(5)
    optimizer = stepped(*model.parameters())
    found = lazy_names(dict(model.state_dict()))
    assert found == ["weight", "bias"]
    assert lazy_names(dict(model.state_dict()), model) == ["weight", "bias"]
    del optimizer


@pytest.mark.parametrize("kind", [list, tuple, set, lambda params: {"a": params[0]}.values()])
def test_parameters_in_a_collection_of_any_kind_are_lazy(kind: Any) -> None:
    weight = parameter(100)
    optimizer = stepped(weight)
    optimizer.param_groups[0]["params"] = kind([weight])
    assert is_lazy(weight)


# ---- what an optimizer owns and does not write -----------------------------------------------------------------------


def test_parameters_that_need_no_gradient_are_captured_inside_save(native: Any, tmp_path: Path) -> None:
    """A target network, a momentum encoder: all parameters were given to the optimizer, and these are written by hand."""
    native.set_fault("pwritev", delay_s=0.05)
    online, target = torch.nn.Linear(300, 300), torch.nn.Linear(300, 300)
    target.requires_grad_(False)
    optimizer = stepped(*online.parameters(), *target.parameters(), kind=torch.optim.AdamW)
    expected = copy.deepcopy(target.state_dict())
    for declared in (None, optimizer, torch.nn.ModuleList([online, target])):
        assert lazy_names(dict(online.state_dict()), declared) == ["weight", "bias"]
        assert lazy_names(dict(target.state_dict()), declared) == []
        pending = ckpt.save(target.state_dict(), tmp_path / "x.pt", lazy=declared, options=options(eager_bytes=0))
        for mine, theirs in zip(target.parameters(), online.parameters(), strict=True):
            mine.data.lerp_(theirs.data, 0.5)
        assert_same(dict(expected), dict(ckpt.load(pending.result(DEADLINE_S))))
        target.load_state_dict(expected)


def test_the_state_of_a_parameter_that_was_frozen_since_is_not_lazy() -> None:
    weight, frozen = parameter(10), parameter(10)
    optimizer = stepped(weight, frozen, kind=torch.optim.AdamW)
    frozen.requires_grad_(False)
    assert is_lazy(weight) and is_lazy(optimizer.state[weight]["exp_avg"])
    assert not is_lazy(frozen) and not is_lazy(optimizer.state[frozen]["exp_avg"])


def test_a_parameter_that_was_never_stepped_is_not_lazy_among_others_that_were() -> None:
    """The target network of somebody who did not say that it needs no gradient."""
    weight, target = parameter(10), parameter(10)
    optimizer = torch.optim.AdamW([weight, target])
    weight.grad = torch.ones(10)
    optimizer.step()
    assert is_lazy(weight) and not is_lazy(target)
    target.grad = torch.ones(10)
    optimizer.step()
    assert is_lazy(target)


def flat_module(at: slice) -> tuple[torch.nn.Parameter, torch.nn.BatchNorm1d]:
    """Statistics of a layer lie in the storage of weights."""
    flat, layer = torch.nn.Parameter(torch.randn(100_000)), torch.nn.BatchNorm1d(1000, affine=False)
    layer.running_mean = flat.data[at]
    return flat, layer


@pytest.mark.parametrize("at", [slice(0, 1000), slice(50_000, 51_000), slice(99_000, 100_000)], ids=["first", "middle", "last"])
@pytest.mark.parametrize("owned", [slice(None), slice(1000, 99_000)], ids=["all", "most"])
def test_statistics_in_the_storage_of_a_parameter_are_captured_inside_save(
    at: slice, owned: slice, native: Any, tmp_path: Path
) -> None:
    native.set_fault("pwritev", delay_s=0.05)
    flat, layer = flat_module(at)
    weights = torch.nn.Parameter(flat.data[owned])
    optimizer = stepped(weights)
    state = {"flat": flat.data, "weights": weights.detach(), "mean": layer.running_mean}
    expected = copy.deepcopy(state)
    pending = ckpt.save(state, tmp_path / "x.pt", options=options(eager_bytes=0))
    layer(torch.randn(8, 1000) + 5)
    found = ckpt.load(pending.result(DEADLINE_S))
    assert_same(expected, found)
    assert not torch.equal(layer.running_mean, expected["mean"])
    del optimizer


def test_only_the_part_of_a_storage_that_is_the_optimizers_is_lazy() -> None:
    flat = torch.randn(10_000)
    first, second = torch.nn.Parameter(flat[:4000]), torch.nn.Parameter(flat[4000:8000].view(40, 100).t())
    optimizer = stepped(first, second)

    def kinds(*tensors: torch.Tensor) -> list[int]:
        return list(make_plan(list(tensors), lazy_storages(), 0).kinds)

    assert kinds(first, second, flat[8001:]) == [LAZY, LAZY, COPY]
    assert kinds(first, second, flat[8000:]) == [COPY], "without a gap they are one record"
    assert kinds(first.detach(), second.detach().t().t()) == [LAZY, LAZY]
    assert kinds(flat) == [COPY], "who writes the rest?"
    assert kinds(flat[:8000]) == [COPY], "a view of both that is neither"
    assert kinds(first.detach()[:100]) == [COPY]
    optimizer.add_param_group({"params": [torch.nn.Parameter(flat[8000:])]})
    assert kinds(flat) == [LAZY]
    assert kinds(flat, first.detach()) == [LAZY]
    assert kinds(flat, flat[5:10]) == [COPY]


# ---- declared --------------------------------------------------------------------------------------------------------


def test_what_may_be_declared() -> None:
    tensors = [torch.randn(4) for _ in range(5)]
    model, optimizer = torch.nn.Linear(2, 2), torch.optim.SGD([parameter(3)], lr=0.1)
    owned = optimizer.param_groups[0]["params"][0]
    everything = [*tensors, model.weight, model.bias, owned]

    def found(declared: Any) -> list[bool]:
        return are_lazy(everything, declared)

    def only(*wanted: torch.Tensor) -> list[bool]:
        return [any(tensor is one for one in wanted) for tensor in everything]

    a, b, c, *_ = tensors
    assert found(None) == found(False) == found([]) == found({}) == only()
    assert found(True) == [True] * len(everything)
    assert found(a) == only(a)
    assert found([a, b]) == found((a, b)) == found(iter([a, b])) == found({"x": a, "y": [b]}) == only(a, b)
    assert found(model) == only(model.weight, model.bias)
    assert found(model.parameters()) == found(model.state_dict()) == only(model.weight, model.bias)
    assert found(optimizer) == only(owned)
    assert found([model, optimizer, {"deep": [[c]]}]) == only(model.weight, model.bias, owned, c)
    assert found(a[1:2]) == only(a), "a view declares its storage"


@pytest.mark.parametrize(
    "wrong",
    [1, 0, 1.5, "weights", b"weights", object(), [1], [None], {"a": "b"}, [["x"]]],
    ids=lambda wrong: type(wrong).__name__,
)
def test_what_may_not_be_declared(wrong: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="lazy="):
        ckpt.save([torch.ones(3)], tmp_path / "x.pt", lazy=wrong, options=options())
    assert list(tmp_path.iterdir()) == []
    with ckpt.Checkpointer(tmp_path / "steps", options=options()) as checkpointer:
        with pytest.raises(TypeError, match="lazy="):
            checkpointer.save(1, [torch.ones(3)], lazy=wrong)
        assert checkpointer.steps() == []
        checkpointer.save(2, [torch.ones(3)]).result(DEADLINE_S)


def test_sparse_tensors_may_be_declared_and_are_not_lazy(native: Any, tmp_path: Path) -> None:
    native.set_fault("pwritev", delay_s=0.02)
    sparse = torch.eye(500).to_sparse()
    expected = sparse.clone()
    pending = ckpt.save([sparse], tmp_path / "x.pt", lazy=[sparse], options=options())
    sparse._values().zero_()
    assert_same([expected], ckpt.load(pending.result(DEADLINE_S)))


def test_declared_tensors_are_lazy_and_the_rest_is_not(native: Any, tmp_path: Path) -> None:
    native.set_fault("pwritev", delay_s=DEADLINE_S)
    state = {"declared": torch.randn(200_000), "other": torch.randn(200_000), "small": torch.randn(8)}
    expected = {name: tensor.clone() for name, tensor in state.items()}
    pending = ckpt.save(state, tmp_path / "x.pt", lazy=[state["declared"], state["small"]], options=options())
    state["other"].zero_()
    state["small"].zero_()
    assert not pending.captured
    clear_faults()
    assert_same(expected, ckpt.load(pending.result(DEADLINE_S)))
    stats = pending.stats
    assert 700_000 < stats.bytes_from_tensors + stats.bytes_copied_at_fence <= state["declared"].nbytes


def test_memory_is_held_until_captured_and_not_longer(native: Any, tmp_path: Path) -> None:
    native.set_fault("fdatasync", delay_s=DEADLINE_S)
    native.set_fault("pwritev", delay_s=DEADLINE_S)
    memory = np.arange(500_000)
    gone = weakref.ref(memory)
    state = {"x": torch.from_numpy(memory)}
    del memory
    pending = ckpt.save(state["x"], tmp_path / "x.pt", lazy=True, options=options())
    state.clear()
    assert gone() is not None and not pending.captured
    native.clear_faults("pwritev")
    ckpt.fence()
    gc.collect()
    assert pending.captured and not pending.done()
    assert gone() is None, "the save lets go once captured"
    native.clear_faults()
    assert torch.equal(ckpt.load(pending.result(DEADLINE_S)), torch.arange(500_000))


def test_a_state_dropped_at_once_is_saved(native: Any, tmp_path: Path) -> None:
    native.set_fault("pwritev", delay_s=0.005)
    expected = torch.arange(1_000_000)
    pending = ckpt.save([torch.arange(1_000_000)], tmp_path / "x.pt", lazy=True, options=options())
    gc.collect()
    others = [torch.full((1_000_000,), -1) for _ in range(5)]
    assert torch.equal(ckpt.load(pending.result(DEADLINE_S))[0], expected)
    del others
