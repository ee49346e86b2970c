"""Safetensors files that come back: in every way that load() and load_into() have, and not at all if they are damaged."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support import assert_same, options

import ckpt
from ckpt.errors import CheckpointError, CorruptError, MismatchError, StorageError
from ckpt.safetensors_header import RANKS

safetensors = pytest.importorskip("safetensors.torch")


def state(value: float = 1.0) -> dict[str, torch.Tensor]:
    """Small ones and large ones, of sizes that leave what follows askew."""
    return {
        "layers.0.weight": torch.arange(300_001, dtype=torch.float32) * value,
        "layers.0.bias": torch.full((7,), value, dtype=torch.bfloat16),
        "layers.1.weight": torch.full((200, 301), value, dtype=torch.float16),
        "scalar": torch.tensor(value, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "mask": torch.arange(100_003) % 3 == 0,
        "codes": torch.arange(70_001, dtype=torch.int64).to(torch.uint8),
    }


def saved(directory: Path, content: dict[str, torch.Tensor] | None = None, name: str = "a.safetensors") -> Path:
    safetensors.save_file(state() if content is None else content, directory / name)
    return directory / name


# ---- load() ----------------------------------------------------------------------------------------------------------


def test_what_save_file_has_written(tmp_path: Path) -> None:
    loaded = ckpt.load(saved(tmp_path))
    assert loaded.keys() == state().keys()
    assert_same(state(), {name: loaded[name] for name in state()})
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert list(loaded) == list(file.offset_keys())


def test_every_dtype(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.arange(48, dtype=torch.uint8).view(dtype).clone() for dtype in RANKS if dtype != torch.bool}
    loaded = ckpt.load(saved(tmp_path, tensors))
    assert {name: (each.dtype, each.shape) for name, each in loaded.items()} == {
        name: (each.dtype, each.shape) for name, each in tensors.items()
    }
    assert all(torch.equal(loaded[name].view(torch.uint8), each.view(torch.uint8)) for name, each in tensors.items())


@pytest.mark.parametrize("beyond", range(0, 64, 8))
def test_large_tensors_lie_as_in_the_file_wherever_its_header_ends(tmp_path: Path, beyond: int) -> None:
    """So they are read straight to their places, and none is askew for its dtype."""
    content = {
        f"of {nbytes} bytes": (torch.arange(nbytes, dtype=torch.int32) % 251).to(torch.uint8).view(torch.int64)
        for nbytes in ((256 << 10) - 8, 256 << 10, (256 << 10) + 8, (1 << 20) + 520, (4 << 20) - 8, (4 << 20) + 520)
    }
    path = tmp_path / "a.safetensors"
    for padding in range(0, 64, 8):  # of which one makes its header end where it shall
        safetensors.save_file(content, path, {"padding": " " * padding})
        begin = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        if begin % 64 == beyond:
            break
    else:
        raise AssertionError("the header is padded otherwise than it was")
    with safetensors.safe_open(path, "pt") as file:
        names = list(file.offset_keys())
    loaded = ckpt.load(path)
    assert_same(content, {name: loaded[name] for name in content})
    for name in names:
        address, nbytes = loaded[name].data_ptr(), loaded[name].nbytes
        assert address % 8 == 0 and (nbytes < 256 << 10 or (address - begin) % 4096 == 0), name
        begin += nbytes


@pytest.mark.parametrize("lost", [1, 4])
def test_a_header_without_padding(tmp_path: Path, lost: int) -> None:
    """Of other writers: their tensors lie askew in the file, and not in memory."""
    content = saved(tmp_path, {"a": torch.randn(300_000), "b": torch.arange(9, dtype=torch.float64)}).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = content[8:end].rstrip() + b" " * (8 - lost)
    header += b" " * (-(len(header) + lost) % 8)
    (tmp_path / "b.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + content[end:])
    assert (8 + len(header)) % 8 == 8 - lost
    loaded = ckpt.load(tmp_path / "b.safetensors")
    assert_same(ckpt.load(tmp_path / "a.safetensors"), loaded)
    assert all(each.data_ptr() % 8 == 0 for each in loaded.values())


def test_what_is_loaded_can_be_changed_and_saved(tmp_path: Path) -> None:
    loaded = ckpt.load(saved(tmp_path))
    for each in loaded.values():
        each.zero_()
    path = ckpt.save(loaded, tmp_path / "b.safetensors", options=options()).result(30)
    assert path.read_bytes() == saved(tmp_path, {name: torch.zeros_like(each) for name, each in state().items()}).read_bytes()


def test_places(tmp_path: Path) -> None:
    path = saved(tmp_path)
    assert {each.device.type for each in ckpt.load(path, map_location="meta").values()} == {"meta"}
    assert {each.device.type for each in ckpt.load(path, map_location={"cpu": "meta"}).values()} == {"meta"}
    seen = []
    loaded = ckpt.load(path, map_location=lambda storage, location: seen.append(location))
    assert seen == ["cpu"] * len(state()) and torch.equal(loaded["scalar"], state()["scalar"])


def test_a_part(tmp_path: Path) -> None:
    path = saved(tmp_path)
    assert_same({"layers.0.bias": state()["layers.0.bias"]}, ckpt.load(path, keys="*.bias"))
    assert ckpt.load(path, keys=["layers.1.*", "empty"]).keys() == {"layers.1.weight", "empty"}
    with pytest.raises(CheckpointError, match="holds nothing that"):
        ckpt.load(path, keys="layers.7.*")


def test_a_file_of_another_name(tmp_path: Path) -> None:
    """As a cache keeps it."""
    path = saved(tmp_path).rename(tmp_path / "5f3a")
    loaded = ckpt.load(path)
    assert_same(state(), {name: loaded[name] for name in state()})
    written(path, {"a": entry(dtype="F7")})
    with pytest.raises(CorruptError, match="F7"):
        ckpt.load(path)


def test_a_file_without_tensors(tmp_path: Path) -> None:
    assert ckpt.load(saved(tmp_path, {})) == {}


# ---- load_into() -----------------------------------------------------------------------------------------------------


def test_into_tensors_that_are_there(tmp_path: Path) -> None:
    """Some lie as in the file, one is strided, one is a part of another."""
    path = saved(tmp_path)
    whole = torch.zeros(400, 301, dtype=torch.float16)
    target = {name: torch.zeros_like(each) for name, each in state().items()}
    target |= {"layers.1.weight": whole[100:300], "codes": torch.zeros(70_001, 2, dtype=torch.uint8)[:, 1]}
    before = {name: each.data_ptr() for name, each in target.items()}
    assert sorted(ckpt.load_into(path, target).loaded) == sorted(state())
    assert all(torch.equal(target[name], each) for name, each in state().items())
    assert {name: each.data_ptr() for name, each in target.items()} == before
    assert not whole[:100].any() and not whole[300:].any()


def test_into_a_module_with_tied_weights(tmp_path: Path) -> None:
    def make() -> torch.nn.Module:
        model = torch.nn.Sequential(torch.nn.Embedding(50, 300), torch.nn.Linear(300, 50, bias=False))
        model[1].weight = model[0].weight
        return model

    model, other = make(), make()
    path = ckpt.save(model, tmp_path / "a.safetensors", options=options()).result(30)
    found = ckpt.load_into(path, other)
    assert (sorted(found.loaded), found.missing, found.unexpected) == (["0.weight", "1.weight"], [], [])
    assert torch.equal(other[1].weight, model[0].weight) and other[0].weight is other[1].weight
    untied = torch.nn.Sequential(torch.nn.Embedding(50, 300), torch.nn.Linear(300, 50, bias=False))
    with pytest.raises(MismatchError, match=r"1\.weight is missing in the file"):
        ckpt.load_into(path, untied)


def test_what_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    target = {name: torch.zeros_like(each) for name, each in state().items()}
    target["scalar"] = torch.zeros(1, dtype=torch.float64)
    with pytest.raises(MismatchError, match="has shape"):
        ckpt.load_into(saved(tmp_path), target)
    assert not any(each.any() for each in target.values())


# ---- several files ---------------------------------------------------------------------------------------------------


def sharded(directory: Path) -> Path:
    """As Hugging Face has it."""
    names = [["layers.0.weight", "empty"], ["layers.0.bias", "layers.1.weight", "scalar"], ["mask", "codes"]]
    weight_map = {}
    for number, part in enumerate(names, 1):
        file = f"model-{number:05}-of-00003.safetensors"
        saved(directory, {name: state()[name] for name in part}, file)
        weight_map |= dict.fromkeys(part, file)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def test_files_of_an_index(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    loaded = ckpt.load(index)
    assert_same(state(), {name: loaded[name] for name in state()})
    assert ckpt.load(index, keys="mask").keys() == {"mask"}
    target = {name: torch.zeros_like(each) for name, each in state().items()}
    ckpt.load_into(index, target)
    assert_same(state(), target)


def test_shards_by_huggingface_hub_are_saved_one_by_one(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    split = hub.split_torch_state_dict_into_shards(state(), max_shard_size="500KB")
    assert split.is_sharded
    for file, names in split.filename_to_tensors.items():
        ckpt.save(
            {name: state()[name] for name in names}, tmp_path / file, metadata={"format": "pt"}, options=options()
        ).result(30)
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = ckpt.load(tmp_path / "model.safetensors.index.json")
    assert_same(state(), {name: loaded[name] for name in state()})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda index, found: found["weight_map"].update(codes="model-00001-of-00003.safetensors"), "different saves"),
        (lambda index, found: found["weight_map"].update(codes="../a.safetensors"), "beside it"),
        (lambda index, found: found["weight_map"].update(codes=5), "not texts"),
        (lambda index, found: found.pop("weight_map"), "weight_map"),
        (lambda index, found: (index.parent / "model-00002-of-00003.safetensors").unlink(), "not there"),
    ],
)
def test_an_index_that_does_not_fit(tmp_path: Path, change: Callable[[Path, Any], Any], text: str) -> None:
    index = sharded(tmp_path)
    found = json.loads(index.read_text())
    change(index, found)
    index.write_text(json.dumps(found))
    with pytest.raises(CorruptError, match=text):
        ckpt.load(index)


# ---- damage ----------------------------------------------------------------------------------------------------------


def entry(dtype: str = "U8", shape: Any = (4,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def written(path: Path, header: Any, data: bytes = bytes(4), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


DAMAGED: dict[str, tuple[Any, str]] = {
    "overlap": ({"a": entry(), "b": entry(shape=[2], offsets=[2, 4])}, "lies over"),
    "hole": ({"a": entry(shape=[1], offsets=[0, 1]), "b": entry(shape=[2], offsets=[2, 4])}, "hole"),
    "late": ({"a": entry(shape=[2], offsets=[2, 4])}, "hole"),
    "more": ({"a": entry(shape=[2], offsets=[0, 2])}, "more than the header tells"),
    "less": ({"a": entry(shape=[5], offsets=[0, 5])}, "truncated"),
    "size": ({"a": entry(dtype="F32")}, "should have 16"),
    "dtype": ({"a": entry(dtype="F7")}, "'F7'"),
    "dtype_number": ({"a": {**entry(), "dtype": 7}}, "dtype"),
    "backwards": ({"a": entry(offsets=[4, 0])}, "no such"),
    "negative": ({"a": entry(shape=[-4])}, "no such"),
    "float": ({"a": entry(shape=[4.0])}, "no such"),
    "true": ({"a": entry(shape=[True, 4])}, "no such"),
    "huge": ({"a": entry(shape=[1 << 62, 1 << 62], offsets=[0, 4])}, "should have"),
    "dimensions": ({"a": entry(shape=[1] * 1000 + [4])}, "no such"),
    "field": ({"a": entry(more=1)}, "not just"),
    "no_field": ({"a": {"dtype": "U8"}}, "not just"),
    "no_entry": ({"a": 5}, "not just"),
    "halves": ({"a": entry(dtype="F4", shape=[1], offsets=[0, 4])}, "twos"),
    "metadata": ({"__metadata__": {"a": 1}, "a": entry()}, "__metadata__"),
    "twins": (
        b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
        "twice",
    ),
    "list": (b"[]", "does not begin"),
    "json": (b'{"a"', "no JSON"),
    "deep": (b'{"a":' + b"[" * 100_000, "no JSON"),
    "unicode": (b'{"\xff": 1}', "no JSON"),
    "digits": (b'{"a":{"dtype":"U8","shape":[' + b"9" * 9999 + b'],"data_offsets":[0,4]}}', "no JSON"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_headers_that_are_refused(name: str, tmp_path: Path) -> None:
    header, text = DAMAGED[name]
    path = written(tmp_path / "a.safetensors", header)
    with pytest.raises(CorruptError, match=text) as caught:
        ckpt.load(path)
    assert f"'{path}'" in str(caught.value) and len(str(caught.value)) < 1000


def test_lengths_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for length, text in ((1 << 63, "may have no more"), (100_000_001, "may have no more"), (10_000, "truncated")):
        with pytest.raises(CorruptError, match=text):
            ckpt.load(written(path, {"a": entry()}, length=length))
    path.write_bytes(b"1234567")
    with pytest.raises(CorruptError, match="7 bytes"):
        ckpt.load(path)
    with pytest.raises(StorageError):
        ckpt.load(tmp_path / "b.safetensors")
    (tmp_path / "c.safetensors").mkdir()
    with pytest.raises(StorageError):
        ckpt.load(tmp_path / "c.safetensors")


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": torch.ones(5), "b": torch.ones(3, dtype=torch.int8)})
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CorruptError):
            ckpt.load(path)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(at=st.integers(0, 200), value=st.integers(0, 255), insert=st.booleans())
@example(7, 1, False)
def test_a_damaged_header_is_an_error_or_harmless(tmp_path: Path, at: int, value: int, insert: bool) -> None:
    """What safetensors takes may be taken, and then is the same; nothing else is."""
    path = saved(tmp_path, {"a": torch.arange(6.0), "b": torch.ones(2, 3, dtype=torch.int8)})
    content = bytearray(path.read_bytes())
    content[at % len(content) : at % len(content) + (not insert)] = bytes([value])
    path.write_bytes(content)
    try:
        loaded = ckpt.load(path)
    except CorruptError:
        return
    theirs = {name: each.clone() for name, each in safetensors.load_file(path).items()}
    assert_same(dict(sorted(theirs.items())), dict(sorted(loaded.items())))


# ---- beside a manifest -----------------------------------------------------------------------------------------------


def bundle_of(directory: Path) -> Path:
    with ckpt.BundleCheckpointer(options=options()) as checkpointer:
        bundle = checkpointer.begin(directory, "step")
        bundle.save(state(), directory / "step" / "model.safetensors", metadata={"format": "pt"})
        return bundle.commit().result(30) / "model.safetensors"


def test_a_bundle_holds_what_save_file_writes(tmp_path: Path) -> None:
    safetensors.save_file(state(), tmp_path / "a", {"format": "pt"})
    assert bundle_of(tmp_path).read_bytes() == (tmp_path / "a").read_bytes()


def test_a_bundle_refuses_what_does_not_fit(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match="'step' is a int"),
        ckpt.BundleCheckpointer(options=options(max_failed_saves=0)) as checkpointer,
    ):
        bundle = checkpointer.begin(tmp_path, "step")
        bundle.save({"step": 5}, tmp_path / "step" / "model.safetensors")
        bundle.commit().result(30)
    assert not (tmp_path / "latest").exists()


def test_damage_is_found_at_the_edges_of_all_reads(tmp_path: Path) -> None:
    large = {"large": torch.arange(1_300_000, dtype=torch.int64), "small": torch.arange(40_000)}
    with ckpt.BundleCheckpointer(options=options()) as checkpointer:
        bundle = checkpointer.begin(tmp_path, "step")
        bundle.save(large, tmp_path / "step" / "model.safetensors", metadata={"padding": ""})
        path = bundle.commit().result(30) / "model.safetensors"
    begin = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert_same(large, dict(sorted(ckpt.load(path).items())))
    first, last = -(-begin // 512) * 512, (begin + large["large"].nbytes) // 512 * 512  # what is read straight to its place
    edges = {begin, first, first + (4 << 20), first + (8 << 20), last, begin + large["large"].nbytes, path.stat().st_size}
    for at in sorted({edge + step for edge in edges for step in (-1, 0)} - {begin - 1, path.stat().st_size}):
        with path.open("r+b") as file:
            right = file.seek(at) and file.read(1)
            file.seek(at)
            file.write(bytes([right[0] ^ 16]))
        with pytest.raises(CorruptError, match=r"manifest\.json beside it"):
            ckpt.load(path)
        with path.open("r+b") as file:
            file.seek(at)
            file.write(right)
    assert_same(large, dict(sorted(ckpt.load(path).items())))


@pytest.mark.parametrize("where", ["header", "tensor"])
def test_a_manifest_beside_it_tells_of_damage(tmp_path: Path, where: str) -> None:
    path = bundle_of(tmp_path)
    assert_same(state(), dict(sorted(ckpt.load(path).items(), key=lambda item: list(state()).index(item[0]))))
    content = bytearray(path.read_bytes())
    if where == "tensor":
        content[-1] ^= 1
    else:
        at = content.index(b"scalar")
        content[at : at + 6] = b"SCALAR"
    path.write_bytes(content)
    with pytest.raises(CorruptError, match=r"manifest\.json beside it"):
        ckpt.load(path)
    target = {name: torch.zeros_like(each) for name, each in state().items()}
    if where == "header":
        target["SCALAR"] = target.pop("scalar")
    with pytest.raises(CorruptError, match=r"manifest\.json beside it"):
        ckpt.load_into(path, target)
    path.write_bytes(content[:-1])
    with pytest.raises(CorruptError, match="truncated"):
        ckpt.load(path, keys="mask")
