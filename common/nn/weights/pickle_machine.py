"""Runs a pickle on plain data: no import, no constructor and no attribute of any library.

The instructions are decoded by `pickletools` and executed here, on dictionaries, lists, tuples,
numbers and texts. A global is an entry of the caller's table or an error; what it is called with
and what is set on it goes to functions of the caller, which check it. Nothing is allocated that is
larger than the bytes that are there.
"""

import pickletools
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from common.io.errors import UserError

_MAX_INSTRUCTIONS = 2_000_000  # a few seconds and some hundred MB
_MAX_BITS = 512  # of an integer
_KEYS = (str, int, float, bytes, type(None))  # whose hash costs nothing

_LITERALS = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
        *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    )
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def run_pickle(
    stream: BinaryIO,
    names: Mapping[tuple[str, str], Any],
    load_persistent: Callable[[Any], Any],
    build: Callable[[Any, Any], None],
) -> Any:
    """Returns what the next pickle of a stream describes; the stream then stands behind it.

    Args:
      stream: the pickle.
      names: what a global (module, name) stands for; callables are called by the pickle.
      load_persistent: gives the object of a persistent id.
      build: checks and takes the state that a pickle sets on an object that is no dictionary;
        the attributes of dictionaries (torch's `_metadata`) are left out.

    Raises:
      UserError: a global that is not in `names`, or an instruction that plain data do not need.
      Exception: nearly any, of a pickle that is broken.
    """
    stack: list[Any] = []
    marks: list[int] = []  # places in the stack
    memo: dict[int, Any] = {}

    def above_mark() -> list[Any]:
        place = marks.pop()
        values = stack[place:]
        del stack[place:]
        return values

    def named(module: str, name: str) -> Any:
        if (module, name) not in names:
            raise UserError(
                f"refused the global {module:.80}.{name:.80}, expected a plain state dict of "
                "tensors (re-save the weights alone, e.g. torch.save(model.state_dict(), ...))"
            )
        return names[module, name]

    argument: Any
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if count >= _MAX_INSTRUCTIONS:
            raise UserError(f"found more than {_MAX_INSTRUCTIONS:,} instructions in the pickle")
        match opcode.name:
            case name if name in _LITERALS:
                if isinstance(argument, int) and argument.bit_length() > _MAX_BITS:
                    raise UserError(f"found an integer of {argument.bit_length()} bits")
                stack.append(argument)
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name]())
            case "MARK":
                marks.append(len(stack))
            case "POP":
                (marks if marks[-1:] == [len(stack)] else stack).pop()
            case "POP_MARK":
                above_mark()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "LIST":
                stack.append(above_mark())
            case "TUPLE":
                stack.append(tuple(above_mark()))
            case name if name in _TUPLES:
                stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
            case "DICT":
                values = above_mark()
                stack.append({})
                set_items(stack[-1], values)
            case "APPEND":
                value = stack.pop()
                _list(stack[-1]).append(value)
            case "APPENDS":
                values = above_mark()
                _list(stack[-1]).extend(values)
            case "SETITEM":
                values = stack[-2:]
                del stack[-2:]
                set_items(stack[-1], values)
            case "SETITEMS":
                values = above_mark()
                set_items(stack[-1], values)
            case "GLOBAL":
                module, _, name = argument.partition(" ")
                stack.append(named(module, name))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(named(str(module), str(name)))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                if not callable(function) or not isinstance(arguments, tuple):
                    raise UserError(f"found a call of {type(function).__name__}, expected none")
                stack.append(function(*arguments))
            case "BUILD":
                state = stack.pop()
                if not (isinstance(stack[-1], dict) and isinstance(state, dict)):
                    build(stack[-1], state)
            case "BINPERSID":
                stack.append(load_persistent(stack.pop()))
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case name:
                raise UserError(f"refused the pickle instruction {name}, expected plain data")
    raise UserError("found no end of the pickle")


def set_items(target: Any, pairs: list[Any]) -> None:
    """Puts keys and values, one after the other, into a dictionary.

    Raises:
      UserError: the target is no dictionary, or a key no plain value.
    """
    if not isinstance(target, dict) or len(pairs) % 2:
        raise UserError(f"found items for {type(target).__name__}, expected a dictionary")
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        if not isinstance(key, _KEYS):
            raise UserError(f"found a key of type {type(key).__name__}, expected text or number")
        target[key] = value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"found elements for {type(value).__name__}, expected a list")
    return value
