"""Reads checkpoints as somebody with torch alone, and says what they hold: this process does not have the library.

It gets lines with a directory and files of what may be in it, and answers each with the name of the file that it is, or with an error.
"""

import json
import sys
import traceback
from pathlib import Path

import torch
from torch_reader import assert_same, load


def find(directory: Path, candidates: list[str]) -> str:
    found = load(directory)
    for candidate in candidates:
        expected = torch.load(candidate, weights_only=False)
        if found.get("number") == expected["number"]:
            assert_same(expected, found, "state")
            return Path(candidate).name
    raise AssertionError(f"it has the number {found.get('number')}")


for line in sys.stdin:
    request = json.loads(line)
    try:
        answer = {"found": find(Path(request["directory"]), request["candidates"])}
    except BaseException:
        answer = {"error": traceback.format_exc()}
    assert "ckpt" not in sys.modules
    print(json.dumps(answer), flush=True)
