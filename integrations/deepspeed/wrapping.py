"""Wraps functions and methods of DeepSpeed, by whatever name they are reached."""

from __future__ import annotations

import functools
import importlib
import inspect
import types
from collections.abc import Callable
from typing import Any

Call = Callable[..., Any]
Wrap = Callable[[Call], Call]  # takes DeepSpeed's function, returns the one to call in its place


def wrap_function(module: str, name: str, wrap: Wrap) -> None:
    """Around a function of a module, if this version of DeepSpeed has it.

    Scripts import such functions, and DeepSpeed binds some to each parameter, long before anything of ours runs. All of these
    hold the same function object; so its code is exchanged, not the name.
    """
    found = _found(module, name)
    if not callable(found):
        return
    function = inspect.unwrap(found)  # somebody else may have been here before
    if not isinstance(function, types.FunctionType) or function.__closure__:
        setattr(importlib.import_module(module), name, functools.wraps(found)(wrap(found)))
        return
    stock = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
    stock.__kwdefaults__ = function.__kwdefaults__
    replacement = functools.wraps(stock)(wrap(stock))
    function.__code__ = _forward.__code__.replace(co_name=function.__name__)
    function.__defaults__, function.__kwdefaults__ = None, {"_replacement": replacement}
    function.__wrapped__ = stock  # type: ignore[attr-defined]  # for whoever asks for its signature


def _forward(*args: Any, _replacement: Call, **kwargs: Any) -> Any:
    return _replacement(*args, **kwargs)


def wrap_method(module: str, owner_name: str, name: str, wrap: Wrap) -> None:
    """Around a method that the class, if there is one, has for itself; what it inherits is wrapped where it comes from."""
    owner = _found(module, owner_name)
    stock = vars(owner).get(name) if isinstance(owner, type) else None
    if isinstance(stock, types.FunctionType):
        setattr(owner, name, functools.wraps(stock)(wrap(stock)))


def _found(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
