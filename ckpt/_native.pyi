from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

# What may happen to the bytes of a record.
COPY: int  # they may change as soon as submit() has returned
LAZY: int  # they may change behind the next fence
OWNED: int  # they never change

class Baseline:  # what is in a finished file, and the file itself, held open
    def let_go(self) -> None: ...  # nothing can be had of it any more

class Job:
    captured: bool
    released: bool
    finished: bool
    error: BaseException | None
    def find_changed(self) -> int | None: ...
    stats: dict[str, Any]
    size: int
    crc32: int  # of what this process wrote
    written: tuple[int, int]
    checksums: tuple[list[int], list[int]]
    edges: tuple[tuple[int, int, int], tuple[int, int, int]]  # only read, and last written: record, bytes, CRC-32
    archives: list[tuple[int, int]]  # of a file of several: offset and length of each
    payloads: list[int]  # of a file of several archives: where each record lies
    piece_checksums: tuple[int, list[int]]  # bytes of a piece; the CRC-32 of each piece of the file
    layout_crc32: int
    limits: tuple[int, int] | None  # of direct I/O: of addresses and lengths, of offsets, in bytes; None before the file exists
    record_count: int
    def take_baseline(self) -> Baseline | None: ...  # once; None if nobody can share blocks with the file
    def drop_baseline(self) -> None: ...
    doubted: list[int]  # of `frozen`, those that look otherwise than in the file before: they were read
    word_sums: list[tuple[int, int]]  # of each record of a device, and the bytes that are in it, if they were wanted
    def directory(self, record_crcs: Sequence[int]) -> tuple[int, bytes]: ...
    def wait_captured(self, timeout_s: float) -> bool: ...
    def wait_released(self, timeout_s: float) -> bool: ...
    def wait_finished(self, timeout_s: float) -> bool: ...
    def fail(self, why: str) -> None: ...

def sample_records(
    *,
    addresses: Sequence[int],  # 0: of a record that is not looked at
    sizes: Sequence[int],
    seed: int,
) -> bytes: ...

class Engine:
    def __init__(
        self,
        arena_bytes: int,
        chunk_bytes: int,
        writers: int,
        cuda_library: str | None = None,
        device_cache_bytes: int = 0,
        device_window_bytes: int = ...,
        pinned_slab_bytes: int = ...,
        smallest_pinned_slab_bytes: int = ...,
        device_batches: bool = False,
        most_arena_bytes: int = 0,
        device_rate: int = 0,
    ) -> None: ...
    def submit(
        self,
        *,
        path: bytes,
        direct: bool,
        archive: bytes,
        head: Sequence[tuple[str, bytes]],
        addresses: Sequence[int],
        sizes: Sequence[int],
        kinds: bytes,  # COPY, LAZY or OWNED of each
        tail: Sequence[tuple[str, bytes]],
        copy_at_most: int,
        uniform_alignment: int,
        verify: bool,
        timeout_s: float,
        share_index: int = 0,
        share_count: int = 1,
        devices: Sequence[int] = (),
        streams: Mapping[int, int] = {},
        expected_limits: tuple[int, int] | None = None,
        with_directory: bool = False,
        like: bytes = b"",
        directory: int = -1,
        probe: bool = False,
        sum: bool = False,
        # Pickles; of each archive which of them is its, and how many storages it has.
        archives: tuple[Sequence[bytes], Sequence[int], Sequence[int]] | None = None,
        alike: bool = False,
        packed: bool = False,  # head and storages, one behind the other, and nothing else
        baseline: Baseline | None = None,  # of the file before
        frozen: Sequence[int] = (),  # records that are the same in it, as far as can be told without reading them
        supposed: Sequence[int] = (),  # those of them of which nobody has said it: believed less, see csrc/jobs/frozen.h
        reuse: bool = False,  # compare it with that, and keep what the next one needs
        share_blocks: bool = True,  # with the file before
        numbers: Sequence[int] = (),  # by which the pickle knows the storages; empty: 0, 1, 2, ...
    ) -> Job: ...
    def fence(self, streams: Mapping[int, int] = {}) -> None: ...
    def order(self, streams: Mapping[int, int]) -> None: ...
    def open_devices(self, devices: Sequence[int]) -> None: ...
    def close(self, timeout_s: float) -> bool: ...
    in_flight: int
    chunk_bytes: int
    def grow_arena(self, bytes: int) -> None: ...
    arena_bytes: int
    most_arena_bytes: int
    arena_used: int
    arena_peak: int
    arena_pinned: bool
    pin_failure: str
    device_caches: dict[int, tuple[int, int, str]]  # device -> bytes of the block, of them in use, why there is none

class RecordFile:
    size: int
    checksummed: bool
    records: list[tuple[str, int, int]]  # name, offset, size
    def __init__(self, path: bytes, direct: bool, threads: int, timeout_s: float) -> None: ...
    def read(
        self,
        destinations: Sequence[tuple[int, int, int]],  # index of a record, address, device or -1
        *,
        whole: bool,
        threads: int,
        timeout_s: float,
        piece_bytes: int = 4194304,
        keep: Any = None,
        driver: str | None = None,
        streams: Mapping[int, int] = {},
    ) -> int | None: ...
    def read_share(
        self,
        destinations: Sequence[tuple[int, int, int]],
        begin: int,
        end: int,
        *,
        threads: int,
        timeout_s: float,
        piece_bytes: int = 4194304,
        keep: Any = None,
    ) -> int: ...
    def check(self, in_memory: Sequence[tuple[int, int, int]], threads: int) -> None: ...
    def claimed_crc32(self, threads: int, timeout_s: float) -> int: ...
    directory_crc32: int
    bytes_read: int

class RangeFile:
    size: int
    bytes_read: int
    def __init__(self, path: bytes, direct: bool) -> None: ...
    def read_bytes(self, offset: int, length: int) -> bytes: ...
    def read(
        self,
        places: Sequence[tuple[int, int, int, int]],  # offset, length, address (0: only checksummed), device or -1
        *,
        threads: int,
        timeout_s: float,
        keep: Any,
        driver: str | None = None,
        streams: Mapping[int, int] = {},
    ) -> list[int]: ...  # the CRC-32 of each

def check_device(device: int, timeout_s: float, driver: str | None = None) -> tuple[str, str]: ...
def write_small_file(path: bytes, bytes: bytes) -> None: ...
def make_durable(files: Sequence[tuple[bytes, bytes]], directories: Sequence[bytes]) -> None: ...
def write_end(path: bytes, offset: int, bytes: bytes) -> None: ...
def rename_path(from_: bytes, to: bytes) -> None: ...
def sync_directory(path: bytes) -> None: ...
def make_directory(path: bytes, durable: bool) -> None: ...
def remove_file(path: bytes) -> None: ...
def remove_directory(path: bytes) -> None: ...
def read_file_ranges(
    path: bytes,
    ranges: Sequence[tuple[int, int, int]],  # offset, length, address in memory of the host; 0: only checksummed
    *,
    direct: bool,
    threads: int,
    timeout_s: float,
    keep: Any,
) -> tuple[int, list[int], int]: ...  # bytes of the file, the CRC-32 of each range, bytes that were read
def verify_torch_file(path: bytes, threads: int) -> bool: ...
def digest_file(path: bytes, threads: int, timeout_s: float = ...) -> tuple[int, int]: ...
def crc32(bytes: Any, crc: int = 0) -> int: ...
def crc32_with(kernel: str, bytes: Any, crc: int = 0, to: Any = None) -> int: ...  # to: gets the bytes, too
def crc32_combine(crc_a: int, crc_b: int, length_b: int) -> int: ...
def crc32_kernels() -> list[str]: ...  # the best first
def type_filter(types: tuple[type, ...], call: Callable[[Any], Any]) -> Callable[[Any], Any]: ...
def choose_kinds(
    records: list[SavedStorage],
    lazy_storages: Callable[[StorageIndex], Mapping[Any, list[Any]] | bool],
    find_writers: Callable[[list[Any], int, int, list[Any] | None, bool], list[torch.Tensor] | None],
    is_shared: Callable[[int, int], bool],
    eager_bytes: int,
    devices: list[int],
    lazy_on_devices: bool,
    kinds: bytearray,
) -> tuple[list[int], list[int], list[SavedStorage]]: ...  # (addresses, sizes, the lazy ones)
def find_elsewhere(records: list[SavedStorage]) -> list[int]: ...  # the numbers of those that are not in host memory
def are_whole(records: list[SavedStorage]) -> bool: ...  # all of them
def find_changed(records: list[SavedStorage]) -> tuple[torch.Tensor | None, bool]: ...
def use_torch_names(
    *, storage_key: str | None, keys_last: bool, one_object: bool, version: str | None, backward_hooks: str | None
) -> None: ...
def add_owned(
    found: dict[Any, list[Any]],
    groups: list[Any],
    state: dict[Any, Any],
    index: StorageIndex | None,
    in_index: bool,  # what is found is noted there, if that takes owners
    tensor_type: type,
    values: Callable[[Any], list[Any]],
    wrappers: tuple[type, Callable[[Any], torch.Tensor]] | None = None,
) -> None: ...
def add_declared(
    found: dict[Any, list[Any]],
    value: Any,
    tensor_type: type,
    values: Callable[[Any], list[Any]],
    wrappers: tuple[type, Callable[[Any], torch.Tensor]] | None = None,
) -> None: ...

class StorageIndex:
    takes_owners: bool

def leak(object: Any) -> None: ...
def crash_point(name: str) -> None: ...
def consult_fault(call: str, path: bytes) -> tuple[int, int]: ...  # an errno or 0; how many bytes to transfer at most, or -1

# Only in a development build:
def set_fault(
    call: str,
    path_part: str = "",
    skip: int = 0,
    count: int = -1,
    error: int = 0,
    short_bytes: int = -1,
    delay_s: float = 0.0,
) -> None: ...
def clear_faults(call: str = "") -> None: ...
def set_crash_point(name: str, skip: int = 0) -> None: ...
def override_io_limits(memory_align: int, offset_align: int) -> None: ...

class SavedStorage:
    """One storage, or one run of it, on its way to the file as `data/<key>`.

    In the pickle it stands for the storage; `persistent_id` turns it into the tuple that torch writes.
    """

    storage: torch.UntypedStorage
    location: str
    tensor: torch.Tensor | None  # one that views it, for its version counter and its name
    others: list[torch.Tensor] | None  # more that are saved of it: they may have counters of their own
    type: Any  # the class that names it in the pickle
    views: list[Any] | None  # the byte intervals that are recorded of it
    address: int  # of the storage; 0: not known yet
    low: int  # the first byte of the storage that is written
    nbytes: int
    numel: int  # of that class
    whole: bool  # must be written whole: a bare storage, or a tensor that covers it
    typed: bool  # named as its dtype by a pickling that we cannot change

    def __new__(
        cls,
        storage: torch.UntypedStorage,
        key: str,
        dtype: torch.dtype | None,  # as torch tells storages apart: None for untyped
        tensor: torch.Tensor | None,
        nbytes: int,
        type: Any = None,
        numel: int = 0,
        /,
    ) -> SavedStorage: ...
    @property
    def key(self) -> str: ...
    @property
    def dtype(self) -> torch.dtype | None: ...

class StatePickler:
    def __init__(
        self,
        *,
        globals: dict[Any, bytes],
        classes: dict[Any, Any],
        tensor_type: type,
        parameter_type: type,
        ordered_dict: type,
        dtype_type: type,
        strided: Any,
        rebuild_tensor: Any,
        location_tag: Callable[[torch.UntypedStorage], str],
        probe: torch.Tensor | None,
        calls: tuple[Any, ...] | None,
        refused: list[torch.Tensor],
        dtypes: dict[torch.dtype, torch.Tensor],
    ) -> None: ...
    @property
    def exchanges(self) -> bool: ...
    @property
    def calls_directly(self) -> bool: ...
    def dump(
        self, root: Any, *, records: dict[Any, Any], order: list[Any], remaps: dict[int, Any], reduce: Callable[[Any], Any]
    ) -> bytes | None: ...
    def read_form(
        self, state: dict[Any, Any], *, wrapper: tuple[type, str, str] | None, is_value: Callable[[type], bool]
    ) -> tuple[bytes, bytes, list[torch.Tensor], list[SavedStorage], list[int], list[Any], list[Any]] | None: ...
