"""Looks at sharded checkpoints as somebody with torch alone: this process does not have the library. Prints a line for each.

    python torch_reader.py <directory with a folder for each case> ...

A folder has `expected.pt`, the state in full; `ours/step-*`, the checkpoint to be looked at; and `stock`, what torch has written of
the same state, unless it refuses that.
"""

import io
import json
import sys
import traceback
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata


def read_metadata(directory: Path) -> Metadata:
    return dcp.FileSystemReader(directory).read_metadata()


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())


def assert_same(expected: Any, found: Any, where: str) -> None:
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, torch.Tensor) and (found.shape, found.dtype) == (expected.shape, expected.dtype), where
        assert bits(found) == bits(expected), f"{where} has other values"
    elif isinstance(expected, dict):
        assert isinstance(found, dict) and set(found) == set(expected), where
        for key in expected:
            assert_same(expected[key], found[key], f"{where}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert type(found) is type(expected) and len(found) == len(expected), where
        for index, pair in enumerate(zip(expected, found, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    else:
        assert type(found) is type(expected) and found == expected, f"{where} is {found!r}, not {expected!r}"


def load(directory: Path) -> dict[str, Any]:
    metadata = read_metadata(directory)
    state: dict[str, Any] = {}
    for key, kind in metadata.state_dict_metadata.items():
        is_tensor = isinstance(kind, TensorStorageMetadata)
        empty = torch.full(kind.size, 1, dtype=torch.uint8).to(kind.properties.dtype) if is_tensor else None
        set_element(state, metadata.planner_data[key], empty)
    dcp.load(state, checkpoint_id=str(directory), no_dist=True)
    return state


def chunks_of(kind: TensorStorageMetadata) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in kind.chunks)


def compare_metadata(ours: Metadata, stock: Metadata) -> None:
    assert ours.version == stock.version and ours.planner_data == stock.planner_data
    assert ours.state_dict_metadata.keys() == stock.state_dict_metadata.keys()
    for key, theirs in stock.state_dict_metadata.items():
        mine = ours.state_dict_metadata[key]
        assert type(mine) is type(theirs), key
        if isinstance(theirs, TensorStorageMetadata):
            compare_strides(mine, theirs, key)
            assert (mine.size, mine.properties) == (theirs.size, theirs.properties), key
            assert chunks_of(mine) == chunks_of(theirs), key
    assert ours.storage_data.keys() == stock.storage_data.keys()


def compare_strides(mine: TensorStorageMetadata, theirs: TensorStorageMetadata, key: str) -> None:
    """Of torch 2.15, unless it was written for older ones. That of a dimension of one element may be anything."""
    ours, stock = (getattr(each.properties, "strides", None) for each in (mine, theirs))
    if ours is not None and stock is not None:
        sizes = theirs.chunks[0].sizes
        pairs = [(a, b) for a, b, size in zip(ours, stock, sizes, strict=True) if size > 1]
        assert all(a == b for a, b in pairs), f"{key} has the strides {ours}, not {stock}"
    for each in (mine, theirs):
        if hasattr(each.properties, "strides"):
            each.properties.strides = None


def check_items(directory: Path, metadata: Metadata) -> None:
    """Each is a complete archive, and what is between them is nobody's."""
    taken: dict[str, list[tuple[int, int]]] = {}
    for index, info in metadata.storage_data.items():
        with open(directory / info.relative_path, "rb") as file:
            file.seek(info.offset)
            piece = file.read(info.length)
        taken.setdefault(info.relative_path, []).append((info.offset, info.offset + info.length))
        assert zipfile.ZipFile(io.BytesIO(piece)).testzip() is None
        kind = metadata.state_dict_metadata[index.fqn]
        if isinstance(kind, BytesStorageMetadata):
            torch.load(io.BytesIO(piece), weights_only=False)
            continue
        chunk = kind.chunks[index.index]
        tensor = torch.load(io.BytesIO(piece), weights_only=True)
        assert type(tensor) is torch.Tensor and tensor.dtype == kind.properties.dtype and not tensor.requires_grad
        assert (chunk.offsets, chunk.sizes) == (index.offset, tensor.shape)
    for places in taken.values():
        places.sort()
        assert all(before[1] <= after[0] for before, after in zip(places, places[1:], strict=False)), "archives overlap"


def check(folder: Path) -> None:
    (directory,) = (folder / "ours").glob("step-*")
    metadata = read_metadata(directory)
    if (folder / "stock").is_dir():
        compare_metadata(metadata, read_metadata(folder / "stock"))
    check_items(directory, metadata)
    expected = torch.load(folder / "expected.pt", weights_only=False)
    found = load(directory)
    expected_flat, found_flat = flatten_state_dict(expected)[0], flatten_state_dict(found)[0]
    assert expected_flat.keys() == found_flat.keys()
    for key in expected_flat:
        assert_same(expected_flat[key], found_flat[key], key)
    dcp_to_torch_save(directory, folder / "converted.pt")
    assert flatten_state_dict(torch.load(folder / "converted.pt", weights_only=False))[0].keys() == expected_flat.keys()


if __name__ == "__main__":
    for folder in sorted(folder for each in sys.argv[1:] for folder in Path(each).iterdir() if folder.is_dir()):
        try:
            check(folder)
            error = ""
        except Exception:
            error = traceback.format_exc()
        assert "ckpt" not in sys.modules
        print(json.dumps({"case": folder.name, "error": error}))
