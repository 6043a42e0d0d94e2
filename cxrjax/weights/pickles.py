"""Pickles read as data: this module follows the opcodes itself, and imports, builds and calls nothing.

A pickle is a program for a small machine that names functions and calls them. Here it can name only what the caller
allows, and a "call" gives either the result of the caller's own function, or a `PickledObject` that describes the call.
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
class PickledObject:
    """An object that was not built: its class (or the function that would make it), arguments and state."""

    constructor: Global
    arguments: tuple = ()
    state: Any = None


class ForbiddenGlobalError(CxrError):
    """The pickle names something that is not allowed."""


@dataclass(frozen=True)
class AllowedGlobals:
    """What a pickle may name.

    Attributes:
      functions: what is called here, in place of what the pickle names.
      is_inert: whether objects of a class may be in the pickle, as `PickledObject`.
      persistent_load: returns the object of a persistent id.
    """

    functions: Mapping[Global, Callable[..., Any]]
    is_inert: Callable[[Global], bool]
    persistent_load: Callable[[Any], Any]

    def find(self, module: Any, name: Any) -> Global:
        """Return the global, or raise `ForbiddenGlobalError`."""
        if not (isinstance(module, str) and isinstance(name, str)) or len(module) + len(name) > _MAX_LENGTH:
            raise ForbiddenGlobalError("asks for what has no name")
        if (named := Global(module, name)) not in self.functions and not self.is_inert(named):
            raise ForbiddenGlobalError(f"asks for {named!s:.200}")
        return named


_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()
_MAX_LENGTH = 4096  # characters of a name or key
_MAX_KEY_PARTS = 64  # of a key that is a tuple
_FREE_COPIES = 1000  # items that calls may copy, in addition to one per byte


def read_pickle(stream: Any, allowed: AllowedGlobals) -> Any:
    """Return the next pickled value of a stream (anything with `read` and `readline`).

    The value consists of None, numbers, text, bytes, tuples, lists, dicts, sets, `PickledObject`, and the results of
    the allowed functions.

    Raises:
      ForbiddenGlobalError: it names something that is not allowed.
      Exception: of many kinds, where it is damaged; memory and time stay in proportion to the number of bytes.
    """
    argument: Any
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    begin, copied = None, 0

    def charge(items: int) -> None:
        """Count what a call copies: one list that is named many times could fill the memory."""
        nonlocal copied
        copied += items
        if copied > (position or 0) - (begin or 0) + _FREE_COPIES:
            raise CxrError("copies more than it holds, which torch.save never writes: nothing more was read")

    def pop_to_mark() -> list[Any]:
        mark = next(i for i in range(len(stack) - 1, -1, -1) if stack[i] is _MARK)
        values = stack[mark + 1 :]
        del stack[mark:]
        return values

    for opcode, argument, position in pickletools.genops(stream):
        begin = position if begin is None else begin
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
                pop_to_mark()
            case "DUP":
                stack.append(stack[-1])
            case "TUPLE":
                stack.append(tuple(pop_to_mark()))
            case name if name in _TUPLES:
                stack[-_TUPLES[name] :] = [tuple(_top(stack, _TUPLES[name]))]
            case "LIST":
                stack.append(pop_to_mark())
            case "DICT":
                stack.append(_set_items({}, pop_to_mark()))
            case "FROZENSET":
                stack.append(frozenset(map(check_key, pop_to_mark())))
            case "APPEND":
                value = stack.pop()
                _extend(stack[-1], [value])
            case "APPENDS" | "ADDITEMS":
                values = pop_to_mark()
                _extend(stack[-1], values)
            case "SETITEM":
                pair = _top(stack, 2)
                del stack[-2:]
                _set_items(stack[-1], pair)
            case "SETITEMS":
                values = pop_to_mark()
                _set_items(stack[-1], values)
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(allowed.find(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack[-2:] = [allowed.find(*_top(stack, 2))]
            case "REDUCE" | "NEWOBJ":
                stack[-2:] = [_call(allowed, charge, *_top(stack, 2))]
            case "NEWOBJ_EX":
                constructor, arguments, _ = _top(stack, 3)
                stack[-3:] = [_call(allowed, charge, constructor, arguments)]
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], PickledObject):
                    stack[-1].state = state
                elif not isinstance(stack[-1], dict):  # attributes of an OrderedDict are not needed
                    raise ValueError(f"a state for a {type(stack[-1]).__name__}")
            case "BINPERSID":
                charge(len(stack[-1]) if isinstance(stack[-1], Sized) else 0)
                stack[-1] = allowed.persistent_load(stack[-1])
            case "STOP":
                return stack.pop()
            case name:
                raise ValueError(f"opcode {name}, which torch.save does not write")
    raise ValueError("the pickle has no end")


def _top(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise ValueError("the pickle takes more than it gives")
    return stack[-count:]


def _call(allowed: AllowedGlobals, charge: Callable[[int], None], constructor: Any, arguments: Any) -> Any:
    if not isinstance(constructor, Global) or not isinstance(arguments, tuple):
        raise ValueError("the pickle calls something that is not a function")
    function = allowed.functions.get(constructor)
    if function is None:
        return PickledObject(constructor, arguments)
    charge(len(arguments))
    charge(sum(len(argument) for argument in arguments if isinstance(argument, Sized)))
    return function(*arguments)


def _extend(target: Any, values: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(values)
    elif isinstance(target, set):
        target.update(map(check_key, values))
    elif not isinstance(target, PickledObject):  # whose items are not needed
        raise ValueError(f"items for a {type(target).__name__}")


def _set_items(target: Any, values: list[Any]) -> Any:
    if isinstance(target, dict):
        target.update(zip(map(check_key, values[::2]), values[1::2], strict=True))
    elif not isinstance(target, PickledObject):
        raise ValueError(f"entries for a {type(target).__name__}")
    return target


def check_key(value: Any) -> Hashable:
    """Return a key if it is plain and short: others may take forever to hash and compare."""
    parts = value if isinstance(value, tuple) else (value,)
    if len(parts) > _MAX_KEY_PARTS:
        raise ValueError(f"a key of {len(parts):,} parts")
    for part in parts:
        if not isinstance(part, str | bytes | int | float | Global | None):
            raise ValueError(f"a {type(part).__name__} as a key")
        if (isinstance(part, str | bytes) and len(part) > _MAX_LENGTH) or (
            isinstance(part, int) and part.bit_length() > 64
        ):
            raise ValueError(f"a {type(part).__name__} as a key that is too long")
    return value
