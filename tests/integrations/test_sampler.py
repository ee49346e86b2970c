"""Samplers of torch go on in the middle of an epoch: the same batches, whatever workers have fetched ahead."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import DEADLINE_S, options
from torch import nn
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

import ckpt
from ckpt.integrations.torch import CheckpointCallback

DATA = list(range(103))


class Numbers(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return len(DATA)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(float(DATA[index]))


def distributed(rank: int = 0, ranks: int = 1, **how: Any) -> Any:
    return DistributedSampler(Numbers(), num_replicas=ranks, rank=rank, shuffle=True, seed=3, **how)


SAMPLERS: dict[str, Any] = {
    "distributed": distributed,
    "second_of_two": lambda: distributed(1, 2),
    "dropping": lambda: distributed(0, 2, drop_last=True),
    "random": lambda: RandomSampler(Numbers(), generator=torch.Generator().manual_seed(1)),
    "random_without_generator": lambda: RandomSampler(Numbers()),
    "with_replacement": lambda: RandomSampler(Numbers(), True, 70, torch.Generator().manual_seed(1)),
    "weighted": lambda: WeightedRandomSampler([1.0] * 103, 90, generator=torch.Generator().manual_seed(2)),
    "subset": lambda: SubsetRandomSampler(range(5, 99), torch.Generator().manual_seed(2)),
    "sequential": lambda: SequentialSampler(Numbers()),
}


class Run:
    """A loop over the data that stops after so many batches, and saves just before."""

    def __init__(self, directory: Path, sampler: Any, batch: int | None = 4, workers: int = 0, **how: Any) -> None:
        torch.manual_seed(0)
        self.sampler = sampler
        self.loader = DataLoader(
            Numbers(), batch_size=batch, sampler=sampler, num_workers=workers, generator=torch.Generator(), **how
        )
        self.model = nn.Linear(1, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-5)
        self.callback = CheckpointCallback(
            directory, model=self.model, optimizer=self.optimizer, data=sampler, options=options()
        )

    def batches(self, epochs: int, stop_after: int | None = None) -> list[list[float]]:
        """Those that it is trained on, with the weights behind each."""
        seen = []
        with self.callback:
            step = self.callback.resume()
            for epoch in range(self.epoch(), epochs):
                if hasattr(self.sampler, "epoch"):
                    self.sampler.set_epoch(epoch)
                for batch in self.loader:
                    self.optimizer.zero_grad()
                    (self.model(batch.reshape(-1, 1)).mean() + torch.rand(1)).backward()
                    self.optimizer.step()
                    step += 1
                    seen.append([*batch.reshape(-1).tolist(), self.model.weight.item(), self.model.bias.item()])
                    if stop_after is not None and len(seen) == stop_after:
                        self.callback.save(step).result(DEADLINE_S)
                        return seen
        return seen

    def epoch(self) -> int:
        return int(self.sampler.state_dict()["epoch"])


def compare(directory: Path, make: Any, stop_after: int, **how: Any) -> None:
    whole = Run(directory / "whole", make(), **how).batches(3)
    first = Run(directory / "parts", make(), **how).batches(3, stop_after)
    rest = Run(directory / "parts", make(), **how).batches(3)
    assert first == whole[:stop_after]
    assert rest == whole[stop_after:]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("stop_after", [1, 30, 33])
def test_a_run_goes_on_behind_what_it_was_trained_on(name: str, stop_after: int, tmp_path: Path) -> None:
    compare(tmp_path, SAMPLERS[name], stop_after)


@pytest.mark.parametrize("stop_after", [1, 25, 26, 27, 51])  # an epoch has 26 batches
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_fetch_ahead_of_it(persistent: bool, stop_after: int, tmp_path: Path) -> None:
    compare(tmp_path, distributed, stop_after, workers=2, persistent_workers=persistent, prefetch_factor=3)


def test_a_loader_without_batches(tmp_path: Path) -> None:
    compare(tmp_path, distributed, 150, batch=None)


def test_the_state_says_where_training_is(tmp_path: Path) -> None:
    Run(tmp_path, distributed(), workers=2).batches(2, 28)
    state = ckpt.load(tmp_path / "step-000000000028" / "state.pt")["data"]
    assert (state["epoch"], state["position"]) == (1, 8)


def test_another_epoch_begins_at_its_beginning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Run(tmp_path, distributed()).batches(3, 30)
    other = Run(tmp_path, distributed())
    with other.callback, caplog.at_level(logging.WARNING, "ckpt"):
        other.callback.resume()
        other.sampler.set_epoch(2)
        assert len(list(other.sampler)) == 103
    assert "resumed in epoch 1, and begin anew in epoch 2" in caplog.text


def test_a_sampler_of_its_own_kind_with_epochs(tmp_path: Path) -> None:
    class Backwards(Sampler[int]):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Iterator[int]:
            return iter([(index + self.epoch) % 103 for index in reversed(range(103))])

    compare(tmp_path, Backwards, 40)


def test_one_whose_order_cannot_be_repeated_is_refused(tmp_path: Path) -> None:
    class Arbitrary(Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(torch.randperm(10).tolist())

    with pytest.raises(TypeError, match="data must have state_dict"):
        Run(tmp_path, Arbitrary())


def test_one_that_keeps_its_own_state_is_left_alone(tmp_path: Path) -> None:
    class Own(SequentialSampler):
        def state_dict(self) -> dict[str, int]:
            return {"epoch": 0}

        def load_state_dict(self, state: dict[str, int]) -> None:
            pass

    sampler = Own(Numbers())
    Run(tmp_path, sampler).batches(1, 2)
    assert type(sampler) is Own
