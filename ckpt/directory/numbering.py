"""Numbers of commits that no two jobs share, although they save to disks that one of them does not see.

What a node has of a line that was given up may come back long after: with its node, or by its drain. It must never pass for a
commit of another line. So each job that saves at a home of tiers reserves its numbers there, durably, under the lock of home.
"""

from __future__ import annotations

from pathlib import Path

from ckpt.directory import manifest as manifests
from ckpt.directory.publish_lock import FOLDER
from ckpt.errors import CorruptError, StorageError
from ckpt.storage import durable

NAME = "numbers.json"
RESERVED = 1_000_000  # commits of one job, until it reserves more


def reserve(directory: Path, above: int) -> int:
    """The number below the first of so many that no other job has had, or will have.

    Args:
        directory: home, whose lock the caller has.
        above: the highest number that it has come across.

    Raises:
        CorruptError: what was reserved before cannot be told.
        StorageError: home cannot be read or written to.
    """
    path = directory / FOLDER / NAME
    base = max(above, _reserved(path))
    durable.make_directory(path.parent, durable=True)
    document = {"format": manifests.FORMAT, "reserved": base + RESERVED}
    durable.replace_durably(path, manifests.with_checksum(document), "numbers")
    return base


def _reserved(path: Path) -> int:
    try:
        return int(manifests.parse_checked(path.read_bytes())["reserved"])
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise StorageError(error.errno or 0, f"cannot read '{path}': {error.strerror}", str(path)) from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CorruptError(
            f"'{path}' cannot be understood ({error!r}): which numbers jobs before have used cannot be told. Remove it only if "
            "no node holds checkpoints that have not come home"
        ) from error
