"""Where the ranks of a node cannot reach each other, or rank 0 cannot reach anybody else."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
from support import assert_no_leak, patience, resources
from test_coordinator import close_together, exchange_together, make_together, without_ranks

from ckpt.coordinator.base import Coordinator
from ckpt.coordinator.leader import LeaderWay
from ckpt.coordinator.shared_directory import FileCoordinator
from ckpt.coordinator.torch_store import StoreCoordinator
from ckpt.coordinator.ways import AloneWay
from ckpt.errors import PeerError, StorageError

TIMEOUT_S = patience(10.0)
RANKS = 3


@pytest.fixture(scope="module", autouse=True)
def leaks_nothing() -> Iterator[None]:
    """One look behind all tests: it takes longer than each of them."""
    before = resources()
    yield
    assert_no_leak(before)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ.keys() - without_ranks().keys():
        monkeypatch.delenv(name)


def refuse(call: str, who: Callable[[], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """As a sandbox does: the names of sockets, or all sockets but those of a network."""
    real = getattr(socket.socket, call)

    def refusing(self: socket.socket, *args: Any, **options: Any) -> Any:
        accepted = "fileno" in options
        of_node = self.family == socket.AF_UNIX if call == "bind" else args[:1] == (socket.AF_UNIX,) and not accepted
        if of_node and who():
            raise PermissionError(errno.EACCES, "refused")
        return real(self, *args, **options)

    monkeypatch.setattr(socket.socket, call, refusing)


@pytest.mark.parametrize("over", ["file", "torch"])
@pytest.mark.parametrize("refused", [{0}, {*range(RANKS)}], ids=["rank 0", "all"])
@pytest.mark.parametrize("call", ["bind", "__init__"])
def test_without_sockets_all_go_on(
    call: str, refused: set[int], over: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 says its words itself, whoever leads the others."""
    own = threading.local()
    refuse(call, lambda: getattr(own, "rank", 0) in refused, monkeypatch)
    store = torch.distributed.HashStore()

    def make(rank: int) -> Coordinator:
        own.rank = rank
        if over == "torch":
            return StoreCoordinator(store, rank, RANKS, timeout_s=TIMEOUT_S)
        return FileCoordinator(tmp_path, rank, RANKS, timeout_s=TIMEOUT_S)

    made = make_together([lambda rank=rank: make(rank) for rank in range(RANKS)])
    assert isinstance(made[0]._way, AloneWay)  # type: ignore[attr-defined]
    for number in range(3):
        assert exchange_together(made, f"a/{number}", TIMEOUT_S) == [[b"0", b"1", b"2"]] * RANKS
    close_together(made)


def test_a_word_that_rank_0_cannot_say_is_heard_by_nobody(tmp_path: Path) -> None:
    """Nor on its own node, where no file is needed: rank 0 says that it has failed, and all ranks must know the same."""
    made = make_together(
        [lambda rank=rank: FileCoordinator(tmp_path, rank, RANKS, timeout_s=TIMEOUT_S) for rank in range(RANKS)]
    )
    assert isinstance(made[0]._way, LeaderWay)  # type: ignore[attr-defined]
    (words,) = tmp_path.rglob("words")
    away = words.rename(words.with_name("away"))
    with pytest.raises(StorageError):
        made[0].broadcast("a/1", b"word", TIMEOUT_S)
    for member in made[1:]:
        with pytest.raises(PeerError):
            member.broadcast("a/1", None, 0.1)
    away.rename(words)
    assert exchange_together(made, "a/2", TIMEOUT_S) == [[b"0", b"1", b"2"]] * RANKS
    close_together(made)
