"""Reads pickles as what they are, a description, and does nothing of what they ask for.

Nothing is imported, called or set: a global becomes its name, what would be called becomes a note of name and arguments, a dict
becomes its pairs, so that not even a key is hashed. So a pickle that was made to do harm can be looked at, too. It costs time
and memory by its own length; nothing in it makes that more.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from ckpt.collector import without_collector
from ckpt.errors import CorruptError


class Global(NamedTuple):
    """Something that a module has, by both names."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Stored(NamedTuple):
    """What lies beside the pickle, and the text or tuple that says what that is."""

    id: Any


class Pairs:
    """A dict: keys and values by turns, as they were set."""

    __slots__ = ("flat",)

    def __init__(self, flat: list[Any]) -> None:
        self.flat = flat

    def items(self) -> list[tuple[Any, Any]]:
        return list(zip(self.flat[::2], self.flat[1::2], strict=False))

    def text_keys(self) -> dict[str, Any]:
        """Those whose keys are texts."""
        return {key: value for key, value in self.items() if isinstance(key, str)}


class Made:
    """What a call would return.

    Attributes:
        what: is called: a Global, if the pickle was not made to do harm.
        args: its arguments.
        state: that would be set; None: none.
        items: that would be appended, or added.
        pairs: that would be set as items.
    """

    __slots__ = ("args", "items", "pairs", "state", "what")

    def __init__(self, what: Any, args: Any) -> None:
        self.what = what
        self.args = args
        self.state: Any = None
        self.items: list[Any] = []
        self.pairs = Pairs([])

    @property
    def name(self) -> str:
        return str(self.what) if isinstance(self.what, Global) else "?"

    def fields(self) -> dict[str, Any]:
        """Of its state, if that is a dict of them."""
        return self.state.text_keys() if isinstance(self.state, Pairs) else {}


def read_pickle(content: Any, at: int = 0) -> tuple[Any, int]:
    """What a pickle describes, and where it ends.

    Args:
        content: bytes, or a memory map.
        at: where it begins.

    Raises:
        CorruptError: it is none, or is cut off.
    """
    machine = _Machine(content, at)
    try:
        with without_collector():
            return machine.run(), machine.at
    except (IndexError, KeyError, ValueError, TypeError, struct.error, AttributeError, UnicodeError) as error:
        raise CorruptError(f"byte {machine.at} of the pickle cannot be understood: {type(error).__name__}: {error}") from error


class _Machine:
    def __init__(self, content: Any, at: int) -> None:
        self.content = content
        self.at = at
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The commonest opcodes first, and here: of 100,000 tensors a pickle has millions."""
        content, steps, memo, stack, end = self.content, _STEPS, self.memo, self.stack, len(self.content)
        while self.at < end:
            code = content[self.at]
            self.at += 1
            if code == _BINPUT:
                memo[content[self.at]] = stack[-1]
                self.at += 1
            elif code == _LONG_BINPUT:
                memo[_FOUR.unpack_from(content, self.at)[0]] = stack[-1]
                self.at += 4
            elif code == _BINGET:
                stack.append(memo[content[self.at]])
                self.at += 1
            elif code == _MEMOIZE:
                memo[len(memo)] = stack[-1]
            elif code == _MARK:
                self.marks.append(len(stack))
            elif code == _STOP:
                return stack.pop()
            else:
                steps[code](self)
        raise ValueError("it has no end")

    def take(self, count: int) -> bytes:
        begin, self.at = self.at, self.at + count
        if count < 0 or self.at > len(self.content):
            raise ValueError("it is cut off")
        return bytes(self.content[begin : self.at])

    def line(self) -> str:
        end = self.content.find(b"\n", self.at)
        if end < 0:
            raise ValueError("it is cut off")
        text = bytes(self.content[self.at : end])
        self.at = end + 1
        return text.decode("utf-8", "backslashreplace")

    def number(self, form: struct.Struct) -> int:
        at, self.at = self.at, self.at + form.size
        return int(form.unpack_from(self.content, at)[0])

    def above_mark(self) -> list[Any]:
        mark = self.marks.pop()
        found = self.stack[mark:]
        del self.stack[mark:]
        return found

    def push(self, value: Any) -> None:
        self.stack.append(value)


_BYTE, _TWO, _FOUR, _SIGNED, _EIGHT, _FLOAT = (struct.Struct(form) for form in ("<B", "<H", "<I", "<i", "<Q", ">d"))
_STOP, _MARK, _BINPUT, _LONG_BINPUT, _BINGET, _MEMOIZE = b".(qrh\x94"
_Step = Callable[[_Machine], Any]


def _text(form: struct.Struct) -> _Step:
    return lambda m: m.push(m.take(m.number(form)).decode("utf-8", "surrogatepass"))


def _bytes(form: struct.Struct) -> _Step:
    return lambda m: m.push(m.take(m.number(form)))


def _integer(form: struct.Struct) -> _Step:
    return lambda m: m.push(m.number(form))


def _long(form: struct.Struct) -> _Step:
    return lambda m: m.push(int.from_bytes(m.take(m.number(form)), "little", signed=True))


def _tuple_of(count: int) -> _Step:
    def make(m: _Machine) -> None:
        if len(m.stack) < count:
            raise IndexError("too little on the stack")
        m.stack[-count:] = [tuple(m.stack[-count:])]

    return make


def _extension(form: struct.Struct) -> _Step:
    return lambda m: m.push(Global("copyreg", f"extension {m.number(form)}"))


def _append(m: _Machine) -> None:
    _extend(m, [m.stack.pop()])


def _extend(m: _Machine, values: list[Any]) -> None:
    target = m.stack[-1]
    (target if isinstance(target, list) else target.items).extend(values)


def _set_items(m: _Machine, flat: list[Any]) -> None:
    target = m.stack[-1]
    (target if isinstance(target, Pairs) else target.pairs).flat.extend(flat)


def _set_item(m: _Machine) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    _set_items(m, [key, value])


def _reduce(m: _Machine) -> None:
    args, what = m.stack.pop(), m.stack.pop()
    m.push(Made(what, args))


def _new_with_keywords(m: _Machine) -> None:
    keywords, args, what = m.stack.pop(), m.stack.pop(), m.stack.pop()
    made = Made(what, args)
    made.pairs = keywords if isinstance(keywords, Pairs) else made.pairs
    m.push(made)


def _build(m: _Machine) -> None:
    state, target = m.stack.pop(), m.stack[-1]
    if isinstance(target, Made):
        target.state = state


def _object(m: _Machine) -> None:
    what, *args = m.above_mark()
    m.push(Made(what, tuple(args)))


def _instance(m: _Machine) -> None:
    what = Global(m.line(), m.line())
    m.push(Made(what, tuple(m.above_mark())))


def _stack_global(m: _Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    m.push(Global(str(module), str(name)))


def _int_line(m: _Machine) -> None:
    text = m.line()
    m.push({"00": False, "01": True}[text] if text in ("00", "01") else int(text))


def _put_line(m: _Machine) -> None:
    m.memo[int(m.line())] = m.stack[-1]


def _set_of(m: _Machine) -> None:
    made = Made(Global("builtins", "frozenset"), ())
    made.items = m.above_mark()
    m.push(made)


def _quoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


_BY_LETTER: dict[str, _Step] = {
    "0": lambda m: m.stack.pop(),
    "1": lambda m: m.above_mark(),
    "2": lambda m: m.push(m.stack[-1]),
    "F": lambda m: m.push(float(m.line())),
    "I": _int_line,
    "J": _integer(_SIGNED),
    "K": _integer(_BYTE),
    "L": lambda m: m.push(int(m.line().rstrip("L"))),
    "M": _integer(_TWO),
    "N": lambda m: m.push(None),
    "P": lambda m: m.push(Stored(m.line())),
    "Q": lambda m: m.push(Stored(m.stack.pop())),
    "R": _reduce,
    "S": lambda m: m.push(_quoted(m.line())),
    "T": lambda m: m.push(m.take(m.number(_SIGNED)).decode("latin-1")),
    "U": lambda m: m.push(m.take(m.number(_BYTE)).decode("latin-1")),
    "V": lambda m: m.push(m.line()),
    "X": _text(_FOUR),
    "a": _append,
    "b": _build,
    "c": lambda m: m.push(Global(m.line(), m.line())),
    "d": lambda m: m.push(Pairs(m.above_mark())),
    "}": lambda m: m.push(Pairs([])),
    "e": lambda m: _extend(m, m.above_mark()),
    "g": lambda m: m.push(m.memo[int(m.line())]),
    "i": _instance,
    "j": lambda m: m.push(m.memo[m.number(_FOUR)]),
    "l": lambda m: m.push(m.above_mark()),
    "]": lambda m: m.push([]),
    "o": _object,
    "p": _put_line,
    "s": _set_item,
    "t": lambda m: m.push(tuple(m.above_mark())),
    ")": lambda m: m.push(()),
    "u": lambda m: _set_items(m, m.above_mark()),
    "G": lambda m: m.push(_FLOAT.unpack(m.take(8))[0]),
    "B": _bytes(_FOUR),
    "C": _bytes(_BYTE),
    "\x80": lambda m: m.take(1),
    "\x81": _reduce,
    "\x82": _extension(_BYTE),
    "\x83": _extension(_TWO),
    "\x84": _extension(_FOUR),
    "\x85": _tuple_of(1),
    "\x86": _tuple_of(2),
    "\x87": _tuple_of(3),
    "\x88": lambda m: m.push(True),
    "\x89": lambda m: m.push(False),
    "\x8a": _long(_BYTE),
    "\x8b": _long(_SIGNED),
    "\x8c": _text(_BYTE),
    "\x8d": _text(_EIGHT),
    "\x8e": _bytes(_EIGHT),
    "\x8f": lambda m: m.push(Made(Global("builtins", "set"), ())),
    "\x90": lambda m: _extend(m, m.above_mark()),
    "\x91": _set_of,
    "\x92": _new_with_keywords,
    "\x93": _stack_global,
    "\x95": lambda m: m.take(8),
    "\x96": _bytes(_EIGHT),
    "\x97": lambda m: m.push(Stored("buffer")),
    "\x98": lambda m: None,
}


def _unknown(m: _Machine) -> None:
    raise ValueError(f"there is no opcode {m.content[m.at - 1]:#04x}")


_STEPS: list[_Step] = [_BY_LETTER.get(chr(code), _unknown) for code in range(256)]
