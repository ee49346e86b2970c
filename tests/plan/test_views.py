"""Views: saved as the bytes that they reference, sharing memory after a load as they did before."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import DEADLINE_S, as_bytes, assert_same, byte_range, options

import ckpt

SMALLEST_FILE = 4096  # what pickle, headers and directory of a few tensors take at most, bytes


def save(state: Any, path: Path, **how: Any) -> Path:
    return ckpt.save(state, path, options=options(**how)).result(DEADLINE_S)


def round_trip(state: Any, directory: Path) -> Any:
    path = save(state, directory / "views.pt")
    for loaded in (torch.load(path, weights_only=False), torch.load(path, weights_only=False, mmap=True)):
        assert_same(state, loaded)
    loaded = ckpt.load(path)
    assert_same(state, loaded)
    return loaded


def record_sizes(path: Path) -> list[int]:
    with zipfile.ZipFile(path) as archive:
        return [info.file_size for info in archive.infolist() if "/data/" in info.filename]


# ---- only what is referenced -----------------------------------------------------------------------------------------


def test_a_view_is_written_alone(tmp_path: Path) -> None:
    big = torch.arange(1_000_000)
    round_trip([big[500:510]], tmp_path)
    assert record_sizes(tmp_path / "views.pt") == [10 * 8]
    assert (tmp_path / "views.pt").stat().st_size < SMALLEST_FILE


def test_a_strided_view_is_written_from_its_first_to_its_last_element(tmp_path: Path) -> None:
    square = torch.arange(10_000).view(100, 100)
    round_trip([square[3:6, 7]], tmp_path)
    assert record_sizes(tmp_path / "views.pt") == [201 * 8]


def test_a_model_of_views_of_one_large_buffer(tmp_path: Path) -> None:
    buffer = torch.randn(1_000_000)
    state = {str(i): buffer[1000 * i : 1000 * i + 10].view(2, 5) for i in range(80)}
    round_trip(state, tmp_path)
    assert record_sizes(tmp_path / "views.pt") == [40] * 80


def test_neighbours_that_do_not_overlap_are_records_of_their_own(tmp_path: Path) -> None:
    buffer = torch.arange(100)
    loaded = round_trip([buffer[10:20], buffer[20:30], buffer[40:50]], tmp_path)
    assert record_sizes(tmp_path / "views.pt") == [80, 80, 80]
    loaded[0].fill_(-1)
    assert torch.equal(loaded[1], buffer[20:30])


def test_views_that_cover_a_flat_buffer_are_one_record(tmp_path: Path) -> None:
    flat = torch.randn(60)
    state = [flat[:20].view(4, 5), flat[20:50], flat[50:]]
    path = save(state, tmp_path / "views.pt")
    assert record_sizes(path) == [240]
    loaded = torch.load(path)
    assert_same(state, loaded)
    assert len({tensor.untyped_storage()._cdata for tensor in loaded}) == 1


def test_the_whole_beside_its_parts_is_one_record(tmp_path: Path) -> None:
    flat = torch.arange(30)
    for state in ([flat[3:9], flat, flat[20:]], [flat, flat[5:6]], [flat[1:2], flat.view(5, 6).t()]):
        round_trip(state, tmp_path)
        assert record_sizes(tmp_path / "views.pt") == [240]


def test_overlapping_views_are_written_once_and_stay_shared(tmp_path: Path) -> None:
    buffer = torch.arange(1000)
    loaded = round_trip({"a": buffer[100:200], "b": buffer[150:300], "c": buffer[290:295], "d": buffer[600:601]}, tmp_path)
    assert sorted(record_sizes(tmp_path / "views.pt")) == [8, 200 * 8]
    loaded["a"][60] = -5
    assert loaded["b"][10] == -5


def test_views_of_several_dtypes(tmp_path: Path) -> None:
    """torch.save refuses these."""
    memory = torch.arange(800, dtype=torch.uint8)
    state = [
        memory[8:72].view(torch.float32),
        memory[16:80].view(torch.int64),
        memory[17:19],
        memory[400:432].view(torch.complex64),
        memory[500:502].view(torch.float16),
    ]
    with pytest.raises(RuntimeError, match="view the same data as different types"):
        torch.save(state, tmp_path / "torch.pt")
    loaded = round_trip(state, tmp_path)
    assert (tmp_path / "views.pt").stat().st_size < SMALLEST_FILE
    loaded[2].fill_(255)
    assert loaded[1].view(torch.uint8)[1] == 255


def test_real_and_imaginary_parts(tmp_path: Path) -> None:
    x = torch.randn(6, dtype=torch.complex64)
    loaded = round_trip([x, x.real, x.imag, torch.view_as_real(x)], tmp_path)
    loaded[0].zero_()
    assert not loaded[1].any() and not loaded[2].any() and not loaded[3].any()


def noted(tensor: torch.Tensor) -> torch.Tensor:
    """Has an attribute, so that torch's own pickling must see to it."""
    tensor.note = "an attribute"  # type: ignore[attr-defined]
    return tensor


COMPLEX = torch.randn(6, dtype=torch.complex64)
FLOATS = torch.arange(4.0)
TORCHS_OWN_AND_ANOTHER_DTYPE = {
    "conj_after_real": [COMPLEX.real, COMPLEX.conj()],
    "conj_before_real": [COMPLEX.conj(), COMPLEX.real],
    "conj_imag": [COMPLEX, COMPLEX.conj().imag],
    "attribute_after_ints": [FLOATS.view(torch.int32), noted(FLOATS.view(4))],
    "attribute_before_ints": [noted(FLOATS.view(4)), FLOATS.view(torch.int32)],
    "two_attributes": [noted(FLOATS.view(4)), noted(FLOATS.view(torch.int32))],
    "typed_storage_after_ints": [FLOATS.view(torch.int32), FLOATS._typed_storage()],
    "typed_storage_before_ints": [FLOATS._typed_storage(), FLOATS.view(torch.int32)],
    "untyped_storage": [FLOATS, FLOATS.untyped_storage()],
}


@pytest.mark.parametrize("state", TORCHS_OWN_AND_ANOTHER_DTYPE.values(), ids=TORCHS_OWN_AND_ANOTHER_DTYPE)
def test_one_storage_in_two_dtypes_is_right_or_refused(state: list[Any], tmp_path: Path) -> None:
    """torch.save refuses all of these: we may do so too, but never write what loads as something else."""
    with pytest.raises(RuntimeError, match="view the same data as different types"):
        torch.save(state, tmp_path / "torch.pt")
    try:
        path = save(state, tmp_path / "s.pt")
    except RuntimeError as error:
        assert "different types" in str(error)
        return
    for mine, found in zip(state, torch.load(path, weights_only=False), strict=True):
        if isinstance(mine, torch.Tensor):
            assert_same(mine, found)
        else:
            assert bytes(mine.untyped()) == bytes(found.untyped())
            assert not isinstance(mine, torch.TypedStorage) or mine.dtype == found.dtype


def test_a_whole_storage_in_two_dtypes(tmp_path: Path) -> None:
    words = torch.arange(10, dtype=torch.int32)
    round_trip([words, words.view(torch.float32), words.view(torch.uint8), words.view(torch.int16)[3:5]], tmp_path)
    assert record_sizes(tmp_path / "views.pt") == [40]


def test_eight_bit_floats_and_their_bytes(tmp_path: Path) -> None:
    bits = torch.arange(64, dtype=torch.uint8)
    round_trip([bits.view(torch.float8_e5m2), bits, bits[5:9].view(torch.float8_e4m3fn)], tmp_path)


def test_empty_views(tmp_path: Path) -> None:
    buffer = torch.arange(1000)
    state = [buffer[5:5], buffer[999:999].view(torch.float64), buffer[:0].view(0, 7), buffer[10:12], buffer[11:11]]
    round_trip(state, tmp_path)
    assert sum(record_sizes(tmp_path / "views.pt")) == 16


def test_only_empty_views_of_two_dtypes(tmp_path: Path) -> None:
    buffer = torch.arange(10)
    round_trip([buffer[3:3], buffer[4:4].view(torch.float32), torch.arange(5)[2:2]], tmp_path)
    assert sum(record_sizes(tmp_path / "views.pt")) == 0


def test_expanded_and_overlapping_strides(tmp_path: Path) -> None:
    row = torch.arange(40)
    state = [row[7:8].expand(100, 100), row[5:9].expand(3, 4), row.as_strided((5, 3), (1, 1), 10)]
    round_trip(state, tmp_path)
    assert sum(record_sizes(tmp_path / "views.pt")) == (4 + 7) * 8


def test_parameters_that_are_views_of_a_flat_parameter(tmp_path: Path) -> None:
    flat = torch.nn.Parameter(torch.randn(100))
    parts = [torch.nn.Parameter(flat.data[10 * i : 10 * i + 10].view(2, 5), requires_grad=i % 2 == 0) for i in range(5)]
    round_trip({"parts": parts}, tmp_path)
    assert record_sizes(tmp_path / "views.pt") == [40] * 5
    round_trip({"parts": parts, "flat": flat}, tmp_path)
    assert record_sizes(tmp_path / "views.pt") == [400]


def test_a_view_beside_its_bare_storage(tmp_path: Path) -> None:
    tensor = torch.arange(100, dtype=torch.float32)
    path = save([tensor[3:5], tensor._typed_storage()], tmp_path / "s.pt")
    assert record_sizes(path) == [400]
    part, storage = torch.load(path, weights_only=False)
    assert part.tolist() == [3, 4] and storage.tolist() == tensor.tolist()
    assert part.untyped_storage().data_ptr() == storage.data_ptr()


def test_a_tensor_that_outgrew_its_use(tmp_path: Path) -> None:
    tensor = torch.randn(10_000)
    tensor.resize_(10)
    round_trip([tensor], tmp_path)
    assert record_sizes(tmp_path / "views.pt") == [40]


def test_views_under_a_subclass_and_in_an_object(tmp_path: Path) -> None:
    """Torch's own pickling hands over whole storages: right, if not small."""
    buffer = torch.arange(1000)
    state = [noted(buffer[10:20]), buffer[15:30], buffer[500:501]]
    path = save(state, tmp_path / "s.pt")
    assert_same(state, torch.load(path, weights_only=False))


def test_torch_save_keeps_unreferenced_bytes_and_we_do_not(tmp_path: Path) -> None:
    secret = torch.full((100_000,), 77, dtype=torch.uint8)
    secret[5] = 1
    torch.save(secret[5:6], tmp_path / "torch.pt")
    save(secret[5:6], tmp_path / "ours.pt")
    assert b"M" * 1000 in (tmp_path / "torch.pt").read_bytes()
    assert b"M" * 10 not in (tmp_path / "ours.pt").read_bytes()


# ---- any views -------------------------------------------------------------------------------------------------------

BUFFER_BYTES = 4096
DTYPES = [torch.uint8, torch.int16, torch.float32, torch.float64, torch.complex128, torch.bfloat16, torch.uint16, torch.bool]


@st.composite
def views(draw: st.DrawFn, buffers: int = 2) -> list[tuple[int, torch.dtype, int, tuple[int, ...], tuple[int, ...]]]:
    """(buffer, dtype, offset, size, stride) of some views that fit their buffers."""
    found = []
    for _ in range(draw(st.integers(1, 8))):
        dtype = draw(st.sampled_from(DTYPES))
        capacity = BUFFER_BYTES // dtype.itemsize
        size = draw(st.lists(st.integers(0, 5), max_size=3))
        stride = [draw(st.integers(0, 12)) for _ in size]
        reach = sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1 if 0 not in size else 0
        offset = draw(st.integers(0, capacity - max(reach, 1)))
        found.append((draw(st.integers(0, buffers - 1)), dtype, offset, tuple(size), tuple(stride)))
    return found


def distinct_bytes(tensors: list[torch.Tensor]) -> int:
    """How many bytes lie between the first and the last of each run of overlapping tensors."""
    total, edge = 0, 0
    for begin, end in sorted(byte_range(tensor) for tensor in tensors):
        total += max(0, end - max(begin, edge))
        edge = max(edge, end)
    return total


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(specs=views(), lazy=st.booleans(), wrap=st.booleans())
def test_any_views_come_back(specs: list[Any], lazy: bool, wrap: bool) -> None:
    buffers = [torch.empty(BUFFER_BYTES, dtype=torch.uint8) for _ in range(2)]
    for buffer in buffers:
        buffer.random_(0, 2)  # also fit for bool
    tensors = []
    for which, dtype, offset, size, stride in specs:
        view = torch.empty(0, dtype=dtype).set_(buffers[which].untyped_storage(), offset, size, stride)
        tensors.append(torch.nn.Parameter(view, requires_grad=False) if wrap else view)
    with tempfile.TemporaryDirectory() as directory:
        how = options(eager_bytes=0, chunk_bytes="64KiB", writers=1, arena_bytes="1MiB")
        path = ckpt.save(tensors, Path(directory) / "v.pt", lazy=lazy, options=how).result(DEADLINE_S)
        loaded = ckpt.load(path)
        written = sum(record_sizes(path))
    assert_same(tensors, loaded)
    # A run may begin up to one element of the widest dtype earlier, so that every dtype counts whole elements.
    widest = max(tensor.dtype.itemsize for tensor in tensors)
    assert written <= distinct_bytes(tensors) + len(tensors) * 2 * widest
    assert all(as_bytes(tensor).numel() <= BUFFER_BYTES for tensor in loaded)
