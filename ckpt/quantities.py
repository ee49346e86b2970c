"""Quantities as people write them: "4GiB"."""

from __future__ import annotations

import re

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {_letter: 1024**_power, f"{_letter}ib": 1024**_power, f"{_letter}b": 1000**_power}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size(value: int | str, name: str = "size") -> int:
    """Bytes from an int or a text such as "4GiB", "512 MiB", "1.5GB" ("GiB" and "G" are 1024-based, "GB" is 1000-based).

    Raises:
        ValueError: the text is not a size, or it is negative.
        TypeError: the value is neither an int nor a str.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f"{name} must be a number of bytes or a text such as '4GiB', not {value!r}")
    if isinstance(value, int):
        if value < 0:
            raise ValueError(f"{name} must not be negative, but is {value}")
        return value
    match = _SIZE.fullmatch(value)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{name} must be a size such as '4GiB', '512MiB' or a number of bytes, not {value!r}")
    return int(float(match[1]) * _UNITS[match[2].lower()])
