"""The file at home that names the run whose home this is. The disks of nodes, which several jobs share, go by that name.

Where it is missing, home is another directory than it was, or its file system is not mounted.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from ckpt.directory.publish_lock import RUN
from ckpt.errors import NotACheckpointError, StorageError
from ckpt.storage import durable
from ckpt.storage.temporary_names import temporary_path


def find_run(home: Path) -> str | None:
    """None if no save of this home has had tiers.

    Raises:
        NotACheckpointError: the file names no run.
        StorageError: it cannot be read.
    """
    path = home / RUN
    try:
        run = json.loads(path.read_bytes())["run"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        text = f"cannot read '{path}': {error.strerror}; check the file system of '{home}'"
        raise StorageError(error.errno or 0, text, str(path)) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _names_none(path, repr(error)) from error
    if not isinstance(run, str) or not run or run != os.path.basename(run) or run in (".", "..") or "\0" in run:
        raise _names_none(path, f"{run!r} is not a plain name")
    return run


def _names_none(path: Path, why: str) -> NotACheckpointError:
    return NotACheckpointError(
        f"'{path}' names no run ({why}): what lies on the nodes cannot be told apart. Write it anew as "
        '{"run": "NAME"}, where NAME is that of the directory on the nodes; or remove it, to begin a new run'
    )


def write_run(home: Path, run: str) -> str:
    """Names the run, unless one is named there already; returns which. `home` is there. It is durable then.

    Raises:
        NotACheckpointError, StorageError: as from find_run(), or it cannot be written.
    """
    found = find_run(home)
    if found is None:
        path = home / RUN
        durable.remove_stale(path)
        temporary = temporary_path(path)
        try:
            durable.write_small_file(temporary, json.dumps({"run": run}).encode() + b"\n")
            durable.crash_point("run-written")
            try:
                durable.link_or_rename(temporary, path)
            except StorageError:
                if not os.path.lexists(path):  # else another job was first
                    raise
        finally:
            durable.remove_quietly(temporary)
        durable.crash_point("run-named")
        found = find_run(home)
        if found is None:
            raise StorageError(0, f"'{path}' was removed as soon as it was written; end whatever does that", str(path))
    durable.sync_directory(home)  # also behind a crash that came before this
    return found
