"""Tensors of which each rank holds a part, in what is pickled as a whole."""

from __future__ import annotations

import re

# In a pickle, the classes of such tensors: their structure is the same everywhere, their bytes are not.
_SHARDED = re.compile(rb"ctorch\.distributed[\w.]*\n(DTensor|ShardedTensor)\n")


def find_shards(pickled: bytes) -> str | None:
    """The name of the class of the first one."""
    found = _SHARDED.search(pickled)
    return None if found is None else found[1].decode()


def is_named_part(value: object) -> bool:
    """Whether it is a tensor of which this rank has parts, and says which: a CheckpointableTensor of torch (2.14), which may be
    a plain tensor with attributes. Older torch does not know them; whoever has set them means it all the same."""
    return hasattr(value, "global_offsets") and hasattr(value, "local_offsets")
