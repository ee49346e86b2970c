"""Tensors of which each rank holds a part, in what is pickled as a whole."""

from __future__ import annotations

import re
from collections.abc import Mapping

_KINDS = ("DTensor", "ShardedTensor")
# In a pickle, the classes of such tensors: their structure is the same everywhere, their bytes are not.
_SHARDED = re.compile(rb"ctorch\.distributed[\w.]*\n(DTensor|ShardedTensor)\n")


def find_shards(pickled: bytes) -> str | None:
    """The name of the class of the first one."""
    found = _SHARDED.search(pickled)
    return None if found is None else found[1].decode()


def path_of_shard(value: object, path: str = "") -> str:
    """Where the first one stands in nested containers, as in "model.layers.0.weight"; empty if it is in something else."""
    if type(value).__name__ in _KINDS:
        return path
    parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    found = (path_of_shard(part, f"{path}.{key}" if path else str(key)) for key, part in parts)
    return next(filter(None, found), "")


def is_named_part(value: object) -> bool:
    """Whether it is a tensor of which this rank has parts, and says which: a CheckpointableTensor of torch (2.14), which may be
    a plain tensor with attributes. Older torch does not know them; whoever has set them means it all the same."""
    return hasattr(value, "global_offsets") and hasattr(value, "local_offsets")
