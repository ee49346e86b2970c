"""Tensors of which each rank holds a part, in what is pickled as a whole."""

from __future__ import annotations

import re

# In a pickle, the classes of such tensors: their structure is the same everywhere, their bytes are not.
_SHARDED = re.compile(rb"ctorch\.distributed[\w.]*\n(DTensor|ShardedTensor)\n")


def find_shards(pickled: bytes) -> str | None:
    """The name of the class of the first one."""
    found = _SHARDED.search(pickled)
    return None if found is None else found[1].decode()
