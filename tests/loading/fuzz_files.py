"""A program: loads files that someone has tampered with, and reports what should not have happened.

    python tests/loading/fuzz_files.py COUNT SEED DIRECTORY

In a process of its own, because what it looks for is a crash, too. What is allowed: an error of ours, or what was saved. Where
the pickle itself is forged, under a right checksum, any object may come out, but no code may have run.
"""

from __future__ import annotations

import io
import json
import random
import resource
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1]))
from support import assert_same, options, standard_output_for_answers

import ckpt
from ckpt import CheckpointError

MEMORY_BYTES = 12 << 30  # of addresses: who asks for more gets an error
INTERESTING = [0, 1, 2, 8, 46, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF, 0xFFFF, 0x8000]
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "socket.connect", "os.remove")


def state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "weights": torch.randn(20, 10, generator=generator),
        "turned": torch.randn(6, 5, generator=generator).t(),
        "mask": torch.tensor([True, False, True]),
        "empty": torch.empty(0),
        "list": [1, 2.5, "text", None, torch.nn.Parameter(torch.ones(3))],
        "step": 17,
    }


def base_files(directory: Path) -> list[bytes]:
    path = directory / "base.pt"
    torch.save(state(), path)
    files = [path.read_bytes()]
    for how in ({}, {"record_alignment": 64}):
        files.append(ckpt.save(state(), path, options=options(**how)).result(60).read_bytes())
    return files


# ---- tampering -------------------------------------------------------------------------------------------------------


def flip(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def cut(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)) :]


def move(rng: random.Random, data: bytearray) -> None:
    begin, to, length = rng.randrange(len(data)), rng.randrange(len(data)), rng.randrange(1, 400)
    piece = data[begin : begin + length]
    if rng.random() < 0.5:
        data[to : to + len(piece)] = piece  # over what is there
    else:
        data[to:to] = piece


def tamper_with_directory(rng: random.Random, data: bytearray) -> None:
    """A field of an entry, or of one of the two end records, gets another value: a wild one, or that of another entry."""
    entries = [at for at in range(len(data) - 46) if data[at : at + 4] == b"PK\1\2"]
    for _ in range(rng.choice((1, 1, 2, 4))):
        width, field = rng.choice([(2, 8), (2, 10), (4, 16), (4, 20), (4, 24), (2, 28), (2, 30), (2, 32), (4, 42), (1, 46)])
        at = rng.choice(entries)
        if rng.random() < 0.2:
            at, (width, field) = data.rindex(b"PK\5\6"), rng.choice([(2, 8), (2, 10), (4, 12), (4, 16), (2, 20)])
        elif rng.random() < 0.2:
            at, (width, field) = data.rindex(b"PK\6\6"), rng.choice([(8, 24), (8, 32), (8, 40), (8, 48)])
        elsewhere = bytes(data[(other := rng.choice(entries)) + field : other + field + width])
        wild = rng.choice([*INTERESTING, rng.randrange(len(data)), len(data)]).to_bytes(8, "little")[:width]
        value = elsewhere if rng.random() < 0.5 and len(elsewhere) == width else wild
        data[at + field : at + field + width] = value


def forge_pickle(rng: random.Random, data: bytearray) -> None:
    """Another pickle under a checksum that is right."""
    with zipfile.ZipFile(io.BytesIO(bytes(data))) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in records if name.endswith("/data.pkl"))
    pickled = bytearray(records[name])
    if rng.random() < 0.2:
        pickled = bytearray(calling(rng))
    else:
        for _ in range(rng.choice((1, 2, 5))):
            pickled[rng.randrange(len(pickled))] = rng.randrange(256)
    records[name] = bytes(pickled)
    forged = io.BytesIO()
    with zipfile.ZipFile(forged, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    data[:] = forged.getvalue()


def calling(rng: random.Random) -> bytes:
    """A pickle that calls something, by each of the ways that pickles have."""
    module, name = rng.choice(
        [("os", "system"), ("posix", "system"), ("builtins", "eval"), ("subprocess", "Popen"), ("torch", "load")]
    )
    argument = b"X" + struct.pack("<I", 9) + b"touch x#1"
    found = b"c" + module.encode() + b"\n" + name.encode() + b"\n"
    return b"\x80\x02" + rng.choice(
        [
            found + argument + b"\x85R.",
            found + argument + b"\x85\x81.",
            b"(" + argument + b"i" + found[1:] + b".",
            found + b"(" + argument + b"o.",
        ]
    )


TAMPER: dict[str, Callable[[random.Random, bytearray], None]] = {
    "flip": flip,
    "cut": cut,
    "move": move,
    "directory": tamper_with_directory,
    "pickle": forge_pickle,
}


# ---- loading ---------------------------------------------------------------------------------------------------------


def zeros() -> dict[str, Any]:
    target = state()
    for tensor in (target["weights"], target["turned"], target["mask"], target["list"][4].data):
        tensor.zero_()
    return target


def load_in_some_way(rng: random.Random, path: Path) -> tuple[Any, Any]:
    """What should come out, and what does."""
    way = rng.randrange(3)
    if way == 0:
        return state(), ckpt.load(path)
    if way == 1:
        return {"weights": state()["weights"]}, ckpt.load(path, keys="weights")
    target = zeros()
    ckpt.load_into(path, target)
    return state(), target


def verdict(rng: random.Random, path: Path, forged: bool) -> str:
    """ "error", "right" or "object"; anything else is a find."""
    try:
        expected, found = load_in_some_way(rng, path)
    except CheckpointError as error:
        return "error" if str(path) in str(error) else f"does not name the file: {error}"
    except Exception as error:
        return f"raises {type(error).__name__}: {str(error)[:200]}"
    if forged:
        return "object"
    try:
        assert_same(expected, found)
    except AssertionError as error:
        return f"returns something else: {error}"
    return "right"


def main(count: int, seed: int, directory: Path) -> dict[str, Any]:
    ran: list[str] = []
    sys.addaudithook(lambda event, arguments: ran.append(event) if event in FORBIDDEN else None)
    bases, path = base_files(directory), directory / "fuzzed.pt"
    ran.clear()
    outcomes: dict[str, int] = {}
    finds = []
    for number in range(count):
        rng = random.Random(f"{seed}/{number}")
        how = rng.choice(list(TAMPER))
        data = bytearray(rng.choice(bases))
        TAMPER[how](rng, data)
        path.write_bytes(data)
        said = verdict(rng, path, forged=how == "pickle")
        if said not in ("error", "right", "object") or ran:
            finds.append(f"{seed}/{number} ({how}): {said} {ran}")
            ran.clear()
            said = "find"
        outcomes[f"{how}: {said}"] = outcomes.get(f"{how}: {said}", 0) + 1
    return {"finds": finds[:50], "outcomes": dict(sorted(outcomes.items()))}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    answers = standard_output_for_answers()
    answers.write(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))) + "\n")
