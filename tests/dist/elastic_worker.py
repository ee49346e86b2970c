"""Under torchrun: the first attempt leaves its messages in the agent's store and crashes; the second must not see them.

elastic_worker.py DIRECTORY
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch.distributed import PrefixStore, TCPStore
from dist.exchange import exchange
from support import patience

from ckpt.coordinator import make_coordinator
from ckpt.coordinator.store_connections import PREFIX
from ckpt.coordinator.torch_store import StoreCoordinator

TIMEOUT_S = patience(20.0)


def count_stale(store: TCPStore, c: StoreCoordinator, session: Path) -> int:
    """Messages of the last attempt that nobody has read. One is looked for: the stores of older torch do not list their keys."""
    left = [f"{session.read_text()}/save/3/box"] if session.exists() else []
    session.write_text(c._session, encoding="utf-8")
    return sum(PrefixStore(PREFIX, store).check([key]) for key in left)


def main(directory: Path) -> None:
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"].encode()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False)
    c = StoreCoordinator(store, rank, world_size)
    stale = count_stale(store, c, directory / "session") if rank == 0 else 0
    own = attempt + b":%d" % rank
    gathered = c.gather("save/1", own, TIMEOUT_S)
    if gathered is not None:
        c.broadcast("save/1", attempt + b" " + b" ".join(gathered), TIMEOUT_S)
        word = c.broadcast("save/2", attempt, TIMEOUT_S)
    else:
        word = c.broadcast("save/1", None, TIMEOUT_S)
        word += b" " + c.broadcast("save/2", None, TIMEOUT_S)
        c.gather("save/3", own, TIMEOUT_S)  # nobody reads it
    (directory / f"{attempt.decode()}.{rank}").write_text(f"{word.decode()}, {stale} stale keys", encoding="utf-8")
    if attempt == b"0":
        exchange(c, "other/1", b"", TIMEOUT_S)
        os._exit(1)
    c.close()
    # gloo would find the addresses of the first attempt in that store: it gets a prefix
    torch.distributed.init_process_group(
        "gloo", store=PrefixStore(f"attempt-{attempt.decode()}", store), rank=rank, world_size=2
    )
    c = make_coordinator(directory=directory)
    assert c.name == "torch"
    assert exchange(c, "save/1", own, TIMEOUT_S) == [b"1:0", b"1:1"]
    c.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
