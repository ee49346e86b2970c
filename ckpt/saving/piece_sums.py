"""The checksums of a data file of torch.distributed.checkpoint, for the file beside it."""

from __future__ import annotations

from ckpt.directory.sharded_files import PieceChecksums
from ckpt.saving.file_in_flight import FileInFlight
from ckpt.saving.linked_job import LinkedJob


def checksums_of(file: FileInFlight) -> bytes:
    """Once it is written."""
    job = file.job
    if isinstance(job, LinkedJob):
        return job.checksums
    piece_bytes, crc32s = job.piece_checksums
    archives, payloads = job.archives, job.payloads
    places = {archives[index][0]: payloads[number] for index, number in enumerate(file.contents.payloads) if number >= 0}
    return PieceChecksums(job.size, piece_bytes, crc32s, places).to_bytes()
