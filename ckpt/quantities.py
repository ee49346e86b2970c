"""Sizes and durations, given as numbers or as texts with a unit: "4GiB", "10min"."""

from __future__ import annotations

import datetime
import math
import re

Duration = float | int | str | datetime.timedelta

_SIZE_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _SIZE_UNITS |= {_letter: 1024**_power, f"{_letter}ib": 1024**_power, f"{_letter}b": 1000**_power}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)
_DURATION_UNITS_S = {"ms": 1e-3, "s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", re.IGNORECASE)


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
    if match is None or match[2].lower() not in _SIZE_UNITS:
        raise ValueError(f"{name} must be a size such as '4GiB', '512MiB' or a number of bytes, not {value!r}")
    return int(float(match[1]) * _SIZE_UNITS[match[2].lower()])


def parse_duration(value: Duration, name: str) -> float:
    """Seconds from a timedelta, a text such as "30s", "10min", "6h", "1d", "500ms", or a number of seconds.

    Raises:
        ValueError: the text is no duration, or the duration is not positive and finite.
        TypeError: the value is something else.
    """
    if isinstance(value, datetime.timedelta):
        seconds = value.total_seconds()
    elif isinstance(value, str):
        match = _DURATION.fullmatch(value)
        if match is None or match[2].lower() not in _DURATION_UNITS_S:
            raise ValueError(f"{name} must be a duration such as '30s', '10min' or '6h', not {value!r}")
        seconds = float(match[1]) * _DURATION_UNITS_S[match[2].lower()]
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        seconds = float(value)
    else:
        raise TypeError(f"{name} must be a duration: a timedelta, a text such as '10min', or seconds; not {value!r}")
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"{name} must be a positive duration, not {value!r}")
    return seconds
