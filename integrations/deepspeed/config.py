"""The section "datastates_ckpt" of a DeepSpeed config, as Options, and what it says besides."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import ckpt

SECTION = "datastates_ckpt"
_CACHE = "host_cache_size"  # GiB, as the engine of that name has it
_WAIT = "wait_before_return"
_TIERS = "tiers"
_NODE = "node"  # the path of a tier
_FIELDS = tuple(field.name for field in dataclasses.fields(ckpt.Options))
_TIER_FIELDS = (_NODE, *list(inspect.signature(ckpt.Tier.node).parameters)[1:])


def options_from(section: Any, base: ckpt.Options | None) -> ckpt.Options:
    """
    Args:
        section: what stands in the config: None, a bool, or a mapping of "host_cache_size" (GiB of staging memory, a number)
            and the fields of Options.
        base: what holds for fields that the section does not name.

    Raises:
        ValueError, TypeError: it has an unknown key or an impossible value; the message lists the valid keys.
    """
    base = base or ckpt.Options()
    if section is None or isinstance(section, bool):
        return base
    if not isinstance(section, Mapping):
        raise TypeError(f'"{SECTION}" in the DeepSpeed config must be an object, not {section!r}; its keys are: {_valid()}')
    unknown = sorted(set(section) - {_CACHE, _WAIT, _TIERS, *_FIELDS})
    if unknown:
        raise ValueError(f'"{SECTION}" in the DeepSpeed config has unknown keys: {", ".join(unknown)}; valid are: {_valid()}')
    changes = {key: value for key, value in section.items() if key not in (_CACHE, _WAIT, _TIERS)}
    if _CACHE in section:
        if "arena_bytes" in section:
            raise ValueError(f'"{SECTION}" in the DeepSpeed config has both "{_CACHE}" and "arena_bytes": they mean the same')
        changes["arena_bytes"] = _gibibytes(section[_CACHE])
    try:
        return dataclasses.replace(base, **changes)
    except (ValueError, TypeError) as error:
        raise type(error)(f'"{SECTION}" in the DeepSpeed config: {error}; valid keys are: {_valid()}') from error


def waits_from(section: Any) -> bool | None:
    """Whether save_checkpoint() waits until all is durable; None: where it saves to another directory than before.

    Raises:
        TypeError: it says neither true nor false.
    """
    wanted = section.get(_WAIT) if isinstance(section, Mapping) else None
    if wanted is not None and not isinstance(wanted, bool):
        raise TypeError(f'"{_WAIT}" in the section "{SECTION}" must be true or false, but is {wanted!r}')
    return wanted


def tiers_from(section: Any, base: Sequence[ckpt.Tier]) -> Sequence[ckpt.Tier]:
    """
    Args:
        base: what holds if the section does not name any.

    Raises:
        TypeError, ValueError: they are not a list of objects such as {"node": "/nvme/ckpt", "keep": 2}.
    """
    if not isinstance(section, Mapping) or _TIERS not in section:
        return base
    given = section[_TIERS]
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Sequence):
        raise TypeError(f'{_in_section(_TIERS)} must be a list such as [{{"{_NODE}": "/nvme/ckpt"}}], but is {given!r}')
    return [_tier_from(each) for each in given]


def _tier_from(given: Any) -> ckpt.Tier:
    if not isinstance(given, Mapping) or _NODE not in given:
        raise TypeError(f'{_in_section(_TIERS)} must hold objects such as {{"{_NODE}": "/nvme/ckpt"}}, but holds {given!r}')
    unknown = sorted(set(given) - {*_TIER_FIELDS})
    if unknown:
        valid = ", ".join(_TIER_FIELDS)
        raise ValueError(f"{_in_section(_TIERS)} has a tier with unknown keys: {', '.join(unknown)}; valid are: {valid}")
    try:
        return ckpt.Tier.node(given[_NODE], **{key: value for key, value in given.items() if key != _NODE})
    except (ValueError, TypeError) as error:
        raise type(error)(f"{_in_section(_TIERS)}: {error}") from error


def _in_section(key: str) -> str:
    return f'"{key}" in the section "{SECTION}" of the DeepSpeed config'


def _gibibytes(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f'"{_CACHE}" in the section "{SECTION}" must be a number of GiB, but is {value!r}')
    return int(value * 2**30)


def _valid() -> str:
    return f"{_CACHE} (GiB), {_WAIT}, {_TIERS}, {', '.join(_FIELDS)}"
