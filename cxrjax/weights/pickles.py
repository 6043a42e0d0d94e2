"""Pickles read as data: the opcodes are followed here, so nothing is imported, built or called.

A pickle is a program for a small machine that names functions and calls them. This one names only what the caller
allows, and "calls" give either what the caller's own function returns, or a `Record` of what would have been called.
"""

import pickletools
from collections.abc import Callable, Hashable, Mapping, Sized
from dataclasses import dataclass
from typing import Any

from cxrjax.errors import CxrError


@dataclass(frozen=True)
class Global:
    """A class or function that a pickle names."""

    module: str
    name: str

    def __str__(self):
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Record:
    """An object that was not built: its class (or the function that would make it), arguments and state."""

    made_by: Global
    arguments: tuple = ()
    state: Any = None


class RefusedError(CxrError):
    """The pickle names something that is not allowed."""


@dataclass(frozen=True)
class Vocabulary:
    """What a pickle may name.

    Attributes:
      functions: what is computed here, in place of what the pickle names.
      inert: whether objects of this kind may be in the pickle, as records.
      persistent: what a persistent id stands for.
    """

    functions: Mapping[Global, Callable[..., Any]]
    inert: Callable[[Global], bool]
    persistent: Callable[[Any], Any]

    def find(self, module: Any, name: Any) -> Global:
        """The thing named, if it may be named."""
        if not (isinstance(module, str) and isinstance(name, str)) or len(module) + len(name) > _LONGEST:
            raise RefusedError("asks for what has no name")
        if (found := Global(module, name)) not in self.functions and not self.inert(found):
            raise RefusedError(f"asks for {found!s:.200}")
        return found


_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()
_LONGEST = 4096  # characters of a name or key
_PARTS = 64  # of a key that is a tuple
_SPARE = 1000  # items that calls may copy, beside one for each byte


def read_pickle(stream: Any, vocabulary: Vocabulary) -> Any:
    """The next pickle of a stream, which is anything with `read` and `readline`.

    The value is made of None, numbers, text, bytes, tuples, lists, dicts, sets, records, and what the caller's
    functions give.

    Raises:
      RefusedError: it names something that the vocabulary does not have.
      Exception: of many kinds, where it is damaged; memory and time stay in proportion to the bytes there are.
    """
    argument: Any
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    begin, copied = None, 0

    def charge(items: int) -> None:
        """Count what a call copies: one list named many times could fill the memory."""
        nonlocal copied
        copied += items
        if copied > (at or 0) - (begin or 0) + _SPARE:
            raise CxrError("copies more than it holds, which torch.save never writes: nothing more was read")

    def since_mark() -> list[Any]:
        mark = next(i for i in range(len(stack) - 1, -1, -1) if stack[i] is _MARK)
        values = stack[mark + 1 :]
        del stack[mark:]
        return values

    for opcode, argument, at in pickletools.genops(stream):
        begin = at if begin is None else begin
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case name if name in _VALUES:
                stack.append(argument)
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case name if name in _EMPTY:
                stack.append(_EMPTY[name]())
            case "MARK":
                stack.append(_MARK)
            case "POP":
                stack.pop()
            case "POP_MARK":
                since_mark()
            case "DUP":
                stack.append(stack[-1])
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case name if name in _TUPLES:
                stack[-_TUPLES[name] :] = [tuple(_top(stack, _TUPLES[name]))]
            case "LIST":
                stack.append(since_mark())
            case "DICT":
                stack.append(_fill({}, since_mark()))
            case "FROZENSET":
                stack.append(frozenset(map(plain_key, since_mark())))
            case "APPEND":
                value = stack.pop()
                _extend(stack[-1], [value])
            case "APPENDS" | "ADDITEMS":
                values = since_mark()
                _extend(stack[-1], values)
            case "SETITEM":
                pair = _top(stack, 2)
                del stack[-2:]
                _fill(stack[-1], pair)
            case "SETITEMS":
                values = since_mark()
                _fill(stack[-1], values)
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(vocabulary.find(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack[-2:] = [vocabulary.find(*_top(stack, 2))]
            case "REDUCE" | "NEWOBJ":
                stack[-2:] = [_call(vocabulary, charge, *_top(stack, 2))]
            case "NEWOBJ_EX":
                made_by, arguments, _ = _top(stack, 3)
                stack[-3:] = [_call(vocabulary, charge, made_by, arguments)]
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], Record):
                    stack[-1].state = state
                elif not isinstance(stack[-1], dict):  # attributes of an OrderedDict are of no use here
                    raise ValueError(f"a state for a {type(stack[-1]).__name__}")
            case "BINPERSID":
                charge(len(stack[-1]) if isinstance(stack[-1], Sized) else 0)
                stack[-1] = vocabulary.persistent(stack[-1])
            case "STOP":
                return stack.pop()
            case name:
                raise ValueError(f"opcode {name}, which torch.save does not write")
    raise ValueError("the pickle has no end")


def _top(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise ValueError("the pickle takes more than it gives")
    return stack[-count:]


def _call(vocabulary: Vocabulary, charge: Callable[[int], None], made_by: Any, arguments: Any) -> Any:
    if not isinstance(made_by, Global) or not isinstance(arguments, tuple):
        raise ValueError("the pickle calls what is no function")
    function = vocabulary.functions.get(made_by)
    if function is None:
        return Record(made_by, arguments)
    charge(len(arguments))
    charge(sum(len(each) for each in arguments if isinstance(each, Sized)))
    return function(*arguments)


def _extend(target: Any, values: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(values)
    elif isinstance(target, set):
        target.update(map(plain_key, values))
    elif not isinstance(target, Record):  # what a record holds is of no use here
        raise ValueError(f"items for a {type(target).__name__}")


def _fill(target: Any, values: list[Any]) -> Any:
    if isinstance(target, dict):
        target.update(zip(map(plain_key, values[::2]), values[1::2], strict=True))
    elif not isinstance(target, Record):
        raise ValueError(f"entries for a {type(target).__name__}")
    return target


def plain_key(value: Any) -> Hashable:
    """A key, if it is a plain and short one: others may take forever to hash and compare."""
    parts = value if isinstance(value, tuple) else (value,)
    if len(parts) > _PARTS:
        raise ValueError(f"a key of {len(parts):,} parts")
    for part in parts:
        if not isinstance(part, str | bytes | int | float | Global | None):
            raise ValueError(f"a {type(part).__name__} as a key")
        if (isinstance(part, str | bytes) and len(part) > _LONGEST) or (
            isinstance(part, int) and part.bit_length() > 64
        ):
            raise ValueError(f"a {type(part).__name__} as a key that is too long")
    return value
