"""Stands in for torch's reader of files, over records that are in memory already.

So what a file means is decided by torch alone, and how its bytes come by us.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ckpt.errors import CorruptError
from ckpt.loading.archive import Records
from ckpt.loading.host_memory import bytes_of


class TorchReader:
    """What torch.serialization takes for its PyTorchFileReader: records that are in memory already.

    Args:
        small: the contents of all records but those of tensors.
        storages: those, by name.
    """

    def __init__(self, archive: Records, small: Mapping[str, bytes], storages: Mapping[str, torch.UntypedStorage]) -> None:
        self.path = archive.path
        self.small = small
        self.storages = storages
        self._records = archive.records

    def has_record(self, name: str) -> bool:
        # The version promises that offsets can be computed; they need not be: all are known.
        return name in self._records and name != ".format_version"

    def get_all_records(self) -> list[str]:
        return list(self._records)

    def get_record(self, name: str) -> bytes:
        if name in self.small:
            return self.small[name]
        return bytes_of(self._storage(name))

    def get_record_offset(self, name: str) -> int:
        if name not in self._records:
            raise CorruptError(f"'{self.path}' has no record '{name}', which its pickle asks for")
        return self._records[name].offset

    def get_storage_from_record(self, name: str, nbytes: int, dtype: Any) -> Any:
        """A storage, as something that torch asks for its `_typed_storage()._untyped_storage`."""
        storage = self._storage(name)
        if storage.nbytes() != nbytes:
            raise CorruptError(f"record '{name}' of '{self.path}' has {storage.nbytes()} bytes, and its pickle says {nbytes}")
        return _AsTyped(storage)

    def serialization_id(self) -> str:
        return self.small.get(".data/serialization_id", b"").decode("ascii", "replace")

    def _storage(self, name: str) -> torch.UntypedStorage:
        try:
            return self.storages[name]
        except KeyError:
            raise CorruptError(f"'{self.path}' has no record '{name}', which its pickle asks for") from None


class _AsTyped:
    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._untyped_storage = storage

    def _typed_storage(self) -> _AsTyped:
        return self
