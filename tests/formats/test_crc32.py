"""The native CRC-32 against zlib's, at every length and alignment at which its kernels change their ways."""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ckpt import _native

# Lengths around which a kernel begins, ends, or goes round its loop once more.
EDGES = sorted({size + off for size in (16, 64, 128, 256, 512, 1024, 4096, 65536) for off in (-17, -1, 0, 1, 17)} - {-1})
BYTES = random.Random(1).randbytes(1 << 20)
Crc = Callable[..., int]


def copying(kernel: str) -> Crc:
    """The sum, of what must have been copied as it is, and nothing beside it."""

    def crc32(content: Any, seed: int = 0) -> int:
        length, begin = len(content), next(BEGINNINGS)
        target = bytearray(b"\xa5" * (begin + length + 64))
        found = _native.crc32_with(kernel, content, seed, memoryview(target)[begin:])
        assert target[begin : begin + length] == content
        assert set(target[:begin]) | set(target[begin + length :]) == {0xA5}
        return found

    return crc32


BEGINNINGS = itertools.cycle([0, *range(1, 65, 7), 64, 32, 16])
KERNELS: dict[str, Crc] = {
    "chosen": _native.crc32,
    **{kernel: partial(_native.crc32_with, kernel) for kernel in _native.crc32_kernels()},
    **{f"{kernel}, copying": copying(kernel) for kernel in _native.crc32_kernels()},
}
each_kernel = pytest.mark.parametrize("crc32", KERNELS.values(), ids=KERNELS)


@each_kernel
def test_every_short_length(crc32: Crc) -> None:
    view = memoryview(BYTES)
    wrong = [length for length in range(1101) if crc32(view[:length]) != zlib.crc32(view[:length])]
    assert not wrong


@each_kernel
def test_every_alignment(crc32: Crc) -> None:
    view = memoryview(BYTES)
    cases = [(start, length) for start in range(65) for length in EDGES]
    wrong = [(start, length) for start, length in cases if crc32(view[start:][:length]) != zlib.crc32(view[start:][:length])]
    assert not wrong


@each_kernel
def test_continues_from_any_value(crc32: Crc) -> None:
    rng = random.Random(2)
    for length in [*range(40), *EDGES]:
        seed = rng.getrandbits(32)
        assert crc32(BYTES[:length], seed) == zlib.crc32(BYTES[:length], seed), (length, seed)


@each_kernel
@pytest.mark.parametrize("fill", [0x00, 0xFF, 0x80, 0x01])
def test_uniform_bytes(crc32: Crc, fill: int) -> None:
    uniform = bytes([fill]) * 5000
    for length in [0, 1, 15, 16, 17, *range(500, 530), 4999, 5000]:
        assert crc32(uniform[:length]) == zlib.crc32(uniform[:length]), length


@each_kernel
def test_a_large_buffer(crc32: Crc) -> None:
    assert crc32(BYTES * 9) == zlib.crc32(BYTES * 9)


@each_kernel
def test_every_single_flipped_bit_changes_it(crc32: Crc) -> None:
    good = bytearray(BYTES[:600])
    expected = crc32(good)
    for bit in range(8 * len(good)):
        good[bit // 8] ^= 1 << bit % 8
        assert crc32(good) != expected, bit
        good[bit // 8] ^= 1 << bit % 8


def test_combine_joins_two_pieces() -> None:
    rng = random.Random(3)
    cases = [(rng.randrange(3000), rng.randrange(3000)) for _ in range(300)] + [(0, 0), (0, 5), (5, 0), (1, 1 << 20)]
    for first, second in cases:
        a, b = BYTES[:first], BYTES[-second:] if second else b""
        assert _native.crc32_combine(zlib.crc32(a), zlib.crc32(b), len(b)) == zlib.crc32(a + b), (first, second)


def test_combine_over_lengths_beyond_32_bits() -> None:
    """Zeros: the CRC-32 of 2^k of them by doubling, checked against zlib while that is feasible."""
    crc, length = zlib.crc32(b"\0"), 1
    while length < 1 << 40:
        if length <= 1 << 22:
            assert crc == zlib.crc32(bytes(length))
        crc = _native.crc32_combine(crc, crc, length)
        length *= 2
    tail = zlib.crc32(b"tail")
    whole = _native.crc32_combine(crc, tail, 4)
    # Appending the tail, and appending 2^40 zeros to nothing and then the tail, must agree with a step-wise join.
    half, half_length = zlib.crc32(b"\0"), 1
    while half_length < 1 << 39:
        half = _native.crc32_combine(half, half, half_length)
        half_length *= 2
    stepwise = _native.crc32_combine(half, _native.crc32_combine(half, tail, 4), half_length + 4)
    assert whole == stepwise


def test_uses_carry_less_multiplication_where_the_processor_has_it() -> None:
    flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    needs = {
        "vpclmulqdq-512": {"vpclmulqdq", "avx512f", "avx512vl", "avx512dq", "pclmulqdq", "sse4_1"},
        "vpclmulqdq-256": {"vpclmulqdq", "avx2", "pclmulqdq", "sse4_1"},
        "pclmulqdq": {"pclmulqdq", "sse4_1"},
        "table": set(),
    }
    assert _native.crc32_kernels() == [kernel for kernel, needed in needs.items() if needed <= flags]


def test_kernels_that_are_not_there_and_memory_that_is_too_small() -> None:
    with pytest.raises(ValueError, match="no CRC-32 kernel 'abacus'"):
        _native.crc32_with("abacus", b"bytes")
    with pytest.raises(ValueError, match="no room"):
        _native.crc32_with("table", b"bytes", to=bytearray(4))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("size", [0, 1, 1 << 20, (9 << 20) + 5])
def test_digest_of_a_file(tmp_path: Path, size: int, threads: int) -> None:
    content = (BYTES * 10)[:size]
    (tmp_path / "f").write_bytes(content)
    assert _native.digest_file(str(tmp_path / "f"), threads) == (size, zlib.crc32(content))
