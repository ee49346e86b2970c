"""What adapters of torch.distributed.checkpoint (DCP) are made of.

`DcpCheckpointer` saves sharded states to directories of a user's naming. The others are for checkpoints that DCP itself plans:
`ItemWriter` and `publish_metadata` write what it has planned, `StagedTensors` keeps what will be written, `VerifiedFile` and
`read_metadata` give nothing that was not verified. Of a tensor that `is_named_part` this rank has parts, and it says which.
"""

from ckpt.dcp_checkpointer import DcpCheckpointer
from ckpt.directory.dcp_directory import read_metadata
from ckpt.plan.shards import is_named_part
from ckpt.restore.verified_file import VerifiedFile
from ckpt.saving.item_files import ItemFiles, ItemWriter, publish_metadata
from ckpt.saving.staged import StagedTensors

__all__ = [
    "DcpCheckpointer",
    "ItemFiles",
    "ItemWriter",
    "StagedTensors",
    "VerifiedFile",
    "is_named_part",
    "publish_metadata",
    "read_metadata",
]
