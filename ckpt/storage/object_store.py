"""A Store in an object store, by way of obstore: S3, Google Cloud Storage and Azure by one interface.

Objects appear whole, or not at all. Two kinds of write tell whether somebody else was quicker: create(), and exchange(). The
answer to either may be lost, and the request repeated: then what is there tells whose it is.
"""

from __future__ import annotations

import errno
import io
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ckpt import _native
from ckpt.errors import CheckpointError, CorruptError, StorageError
from ckpt.storage import durable
from ckpt.storage.block_files import ALIGNMENT, Block, BlockReader
from ckpt.storage.object_urls import parse_url
from ckpt.storage.stores import StoredObject, expect_key

_PART_BYTES = 16 << 20
_MOST_PARTS = 9000  # S3 takes 10,000
_IN_FLIGHT = 16
_MOST_BYTES_IN_FLIGHT = 512 << 20
_LARGEST_SMALL = 1 << 26

# What obstore takes beside what it knows of each kind of store: how it connects.
CLIENT_OPTIONS = frozenset(
    [
        *("allow_http", "allow_invalid_certificates", "connect_timeout", "default_content_type", "http1_only", "http2_only"),
        *("http2_keep_alive_interval", "http2_keep_alive_timeout", "http2_keep_alive_while_idle", "pool_idle_timeout"),
        *("pool_max_idle_per_host", "proxy_url", "proxy_ca_certificate", "proxy_excludes", "root_certificate"),
        *("randomize_addresses", "read_timeout", "timeout", "user_agent"),
    ]
)
# Of all options these alone may be told to anybody. Whatever is not here may be secret.
PLAIN_OPTIONS = frozenset(
    [
        *("endpoint", "region", "bucket_region", "default_region", "allow_http", "virtual_hosted_style_request", "s3_express"),
        *("unsigned_payload", "skip_signature", "conditional_put", "account_name", "use_emulator"),
        *("timeout", "connect_timeout", "read_timeout"),
    ]
)
_DEFAULT_CLIENT = {"connect_timeout": "10s", "timeout": "300s"}
_VARIABLES = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}  # how names in the environment begin
_RETRIES = 3
_TRANSIENT_STATUS = (408, 425, 429)
_STATUS = re.compile(r"status code: (\d{3})")
_TRANSIENT_CODES = ("RequestTimeout", "SlowDown", "ThrottlingException")  # that come with a 400 or a 403, too


class ObjectStoreError(StorageError):
    """
    Attributes:
        permanent: a person has to change something first: credentials, the name of the bucket. Else it may pass by itself.
    """

    def __init__(self, code: int, message: str, url: str | None = None, *, permanent: bool = False) -> None:
        super().__init__(code, message, url)
        self.permanent = permanent

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake, (self.errno, self.message, self.filename, self.permanent)


def _remake(code: int, message: str, url: str | None, permanent: bool) -> ObjectStoreError:
    return ObjectStoreError(code, message, url, permanent=permanent)


class Small(NamedTuple):
    """A small object. `version`: names this content of it, for exchange()."""

    content: bytes
    version: Mapping[str, str]


class ObjectStore:
    """What lies below a URL. Any thread may call it.

    Args:
        options: for obstore, beside what it finds in the environment, such as {"endpoint": ..., "allow_http": "true"}.
        retries: of a request that has failed in a way that may pass by itself.

    Raises:
        ValueError: the URL, or an option, is impossible.
        ObjectStoreError: obstore is not installed.
    """

    def __init__(self, url: str, options: Mapping[str, str] | None = None, *, retries: int = _RETRIES) -> None:
        self.url = str(parse_url(url))
        self._options = dict(options or {})
        self._client = import_obstore(self.url)
        self._store = self._open(retries)

    def __repr__(self) -> str:
        return f"ObjectStore({self.url!r})"  # options may be secret

    def _open(self, retries: int) -> Any:
        config = {key: value for key, value in self._options.items() if key not in CLIENT_OPTIONS}
        own = {key: value for key, value in self._options.items() if key in CLIENT_OPTIONS}
        client = _DEFAULT_CLIENT | _client_options_around(parse_url(self.url).scheme) | own
        try:
            return self._client.store.from_url(
                self.url, config=config, client_options=client, retry_config={"max_retries": retries}
            )
        except BaseException as error:  # a panic of its native part is no Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
                raise
            raise ValueError(f"'{self.url}' cannot be used with these options: {self._told(error)}") from None

    # ---- as a Store ------------------------------------------------------------------------------------------------

    def put(self, key: str, source: Path, crc32: int) -> None:
        """See Store."""
        durable.refuse_irregular(source, "copy")
        self.put_file(key, source, crc32)

    def replace(self, key: str, content: bytes) -> None:
        """See Store."""
        self._put(key, content, "overwrite")

    def open(self, key: str) -> BinaryIO:
        """See Store. Of small objects: all of it is read."""
        found = self.read_small(key)
        if found is None:
            raise ObjectStoreError(errno.ENOENT, f"cannot read '{self._at(key)}': it is not there", self._at(key))
        return io.BytesIO(found.content)

    def list(self, prefix: str) -> list[StoredObject]:
        """See Store."""
        folder = prefix.rpartition("/")[0]
        try:
            found = [each for page in self._client.list(self._store, folder or None) for each in page]
        except Exception as error:
            raise self._failed("list", prefix, error) from None
        stored = (StoredObject(each["path"], each["size"]) for each in found)
        return sorted((each for each in stored if each.key.startswith(prefix)), key=lambda each: each.key)

    def remove(self, key: str) -> None:
        """See Store."""
        self.remove_all([key])

    def remove_all(self, keys: Sequence[str]) -> None:
        """As remove(), of several; if it raises, some may be gone."""
        paths = [expect_key(key) for key in keys]
        try:
            self._client.delete(self._store, paths)
        except Exception as error:
            if not isinstance(error, FileNotFoundError) or "NoSuchBucket" in str(error):
                raise self._failed("remove", keys[0], error) from None

    # ---- more than a Store -----------------------------------------------------------------------------------------

    def put_file(
        self,
        key: str,
        source: Path,
        crc32: int,
        *,
        direct: bool = False,
        share: int = 1,
        before: Callable[[int], object] = lambda _: None,
    ) -> int:
        """As put(). Returns its size.

        Args:
            direct: whether to read past the page cache, where that can be done.
            share: how many files are put at the same time, among which the memory is divided.
            before: called with the size of each chunk before it goes on its way; what it raises ends all.

        Raises:
            CorruptError: see Store.
            ObjectStoreError: it was refused, or did not arrive; nothing is under the key then but what was before.
            StorageError: the file cannot be read.
        """
        with BlockReader(source, direct=direct) as reader:
            part, in_flight = parts_for(reader.size, share)
            self._put_chunks(key, _checked(reader, part, crc32, before), part, in_flight)
            return reader.size

    def _put_chunks(self, key: str, chunks: Iterator[memoryview], part_bytes: int, in_flight: int) -> None:
        expect_key(key)
        first, second = next(chunks), next(chunks, None)
        if second is None:
            self._put(key, first, "overwrite")
            return
        failure: list[BaseException] = []

        def watched() -> Iterator[memoryview]:
            try:
                yield from itertools.chain((first, second), chunks)
            except BaseException as error:
                failure.append(error)
                raise

        try:
            more = {"chunk_size": part_bytes, "max_concurrency": in_flight}
            self._client.put(self._store, key, watched(), **more)
        except Exception as error:
            if failure:
                raise failure[0] from None
            raise self._failed("write", key, error) from None

    def create(self, key: str, content: bytes) -> bool:
        """False: something else is there. What is there and equal was made by an attempt whose answer was lost."""
        try:
            self._put(key, content, "create")
        except _TakenError:
            found = self.read_small(key)
            return found is not None and found.content == content
        return True

    def exchange(self, key: str, content: bytes, before: Small) -> bool:
        """Replaces it if nobody has since it was read. False: somebody has, and not by the same."""
        try:
            self._put(key, content, dict(before.version))
        except _TakenError:
            found = self.read_small(key)
            return found is not None and found.content == content
        return True

    def read_small(self, key: str) -> Small | None:
        """None: it is not there."""
        expect_key(key)
        try:
            found = self._client.get(self._store, key)
            meta = found.meta
            if meta["size"] > _LARGEST_SMALL:
                raise CorruptError(f"'{self._at(key)}' has {meta['size']} bytes, which is too much for what it should be")
            version = {name: str(meta[name]) for name in ("e_tag", "version") if meta.get(name) is not None}
            return Small(bytes(found.bytes()), version)
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise self._failed("read", key, error) from None
            return None
        except CheckpointError:
            raise
        except Exception as error:
            raise self._failed("read", key, error) from None

    def read_range(self, key: str, begin: int, end: int) -> memoryview:
        """
        Raises:
            CorruptError: it does not have these bytes.
            ObjectStoreError: it is not there, or cannot be read.
        """
        expect_key(key)
        try:
            found = memoryview(self._client.get_range(self._store, key, start=begin, end=end))
        except Exception as error:
            raise self._failed("read", key, error) from None
        if found.nbytes != end - begin:
            raise CorruptError(f"'{self._at(key)}' ends at byte {begin + found.nbytes}")
        return found

    # ---- errors ----------------------------------------------------------------------------------------------------

    def _put(self, key: str, content: bytes | memoryview, mode: Any) -> None:
        expect_key(key)
        try:
            self._client.put(self._store, key, content, mode=mode, use_multipart=False)
        except Exception as error:
            kinds = self._client.exceptions
            if isinstance(error, (kinds.AlreadyExistsError, kinds.PreconditionError)):
                raise _TakenError from None
            raise self._failed("write", key, error) from None

    def _at(self, key: str) -> str:
        return f"{self.url}/{key}"

    def _failed(self, doing: str, key: str, error: BaseException) -> ObjectStoreError:
        """Not chained to the error itself, whose text may hold what is secret."""
        code, permanent = _judged(error, self._client.exceptions)
        text = f"cannot {doing} '{self._at(key)}': {self._told(error)}"
        return ObjectStoreError(code, text, self._at(key), permanent=permanent)

    def _told(self, error: BaseException) -> str:
        """Without what may be secret: options, and what follows the "?" of a URL."""
        text = re.sub(r"(https?://[^\s?'\"]*)\?[^\s'\"]*", r"\1?...", str(error).partition("\n\nDebug source")[0])
        hidden = [value for key, value in self._options.items() if key not in PLAIN_OPTIONS | CLIENT_OPTIONS or "@" in value]
        for value in sorted(hidden, key=len, reverse=True):
            text = text.replace(value, "...") if value else text
        return " ".join(text.split())[:600]


class _TakenError(Exception):
    """Something else is there."""


def import_obstore(url: str) -> Any:
    """
    Raises:
        ObjectStoreError: it is not installed.
    """
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError as error:
        text = f"'{url}' needs the package obstore, which cannot be imported ({error}): pip install 'lazyckpt[object]'"
        raise ObjectStoreError(errno.ENOPKG, text, url, permanent=True) from error
    return obstore


def _client_options_around(scheme: str) -> dict[str, str]:
    """Those in the environment, under the names that obstore looks for. It does not once it is given some."""
    names = {key: f"{_VARIABLES[scheme]}_{key.upper()}" for key in CLIENT_OPTIONS}
    return {key: os.environ[name] for key, name in names.items() if name in os.environ}


def parts_for(size: int, share: int = 1) -> tuple[int, int]:
    """How large the parts of an object of so many bytes are, and how many may be on their way at a time.

    Args:
        share: see put_file().
    """
    part = max(_PART_BYTES, -(-size // _MOST_PARTS))
    part = -(-part // ALIGNMENT) * ALIGNMENT
    return part, max(2, min(_IN_FLIGHT, _MOST_BYTES_IN_FLIGHT // part) // share)


def _checked(reader: BlockReader, part: int, crc32: int, before: Callable[[int], object]) -> Iterator[memoryview]:
    """What is in the file, each chunk in memory of its own; the last comes only if all has the CRC-32 that it should have."""
    done, found = 0, 0
    while True:
        size = min(part, reader.size - done)
        before(size)
        block = Block(-(-max(size, 1) // ALIGNMENT) * ALIGNMENT)
        if reader.read(block, done) != size:
            raise CorruptError(f"'{reader.path}' ends at byte {done}, and should have {reader.size}")
        chunk = block.memory[:size]
        done, found = done + size, _native.crc32(chunk, found)
        if done < reader.size:
            yield chunk
            continue
        if found != crc32:
            raise CorruptError(
                f"'{reader.path}' has the CRC-32 {found:08x} where {crc32:08x} was expected: it is damaged, or was written to; "
                "it was not copied"
            )
        yield chunk
        return


def _judged(error: BaseException, kinds: Any) -> tuple[int, bool]:
    """An errno that comes near, and whether a person has to change something."""
    text = str(error)
    if any(code in text for code in _TRANSIENT_CODES):
        return errno.EAGAIN, False
    status = _STATUS.search(text)
    number = 0 if status is None else int(status[1])
    if isinstance(error, (kinds.PermissionDeniedError, kinds.UnauthenticatedError)) or number in (401, 403):
        return errno.EACCES, True
    if "NoSuchBucket" in text or isinstance(error, (kinds.InvalidPathError, kinds.UnknownConfigurationKeyError)):
        return errno.ENOENT, True
    if isinstance(error, FileNotFoundError) or number == 404:
        return errno.ENOENT, False
    if 400 <= number < 500 and number not in _TRANSIENT_STATUS:
        return errno.EINVAL, True
    return errno.EAGAIN if number else errno.EHOSTUNREACH, False
