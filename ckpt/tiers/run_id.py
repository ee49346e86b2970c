"""The name of a run: it tells on the disks of nodes, which several jobs share, whose checkpoints lie there.

It stands at home, in a file that is made once and stays: the same job, started again, finds what it has left on its nodes.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from ckpt.directory.publish_lock import FOLDER
from ckpt.directory.run_file import find_run, write_run
from ckpt.directory.step_names import names_in

_ID_BYTES = 8


def choose_run(home: Path) -> str:
    """The name of the run; one that make_run() is to write yet, if there is none.

    Raises:
        NotACheckpointError, StorageError: as from find_run().
    """
    return find_run(home) or secrets.token_hex(_ID_BYTES)


def make_run(home: Path, chosen: str = "") -> str:
    """The name of the run, from now on this one if there is none yet. Only rank 0 calls it; `home` is there. It is durable
    then.

    Args:
        chosen: by choose_run(), before; empty: now.

    Raises:
        NotACheckpointError, StorageError: as from write_run().
    """
    return write_run(home, chosen or secrets.token_hex(_ID_BYTES))


def highest_on_its_way(home: Path, run: str) -> int:
    """The highest sequence number of what nodes deliver to this home; -1: nothing. It may be on no node any more.

    Raises:
        StorageError: that cannot be read.
    """
    return max((int(name) for name in names_in(home / FOLDER / run) if name.isdecimal()), default=-1)
