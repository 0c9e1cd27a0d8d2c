"""How much stack machine code needs: read from the assembly that LLVM prints for it.

A frame is what a function pushes, what it subtracts from the stack pointer, and what aligning that may skip. All of
these are added up wherever they stand in a function, so the result is an upper bound. TensorIR has no recursion and no
arrays of variable size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bitwright.compiler.errors import InternalError

# Of memcpy, rounding and mathematical functions, which somebody else's library may provide.
EXTERNAL_BYTES = 128
# net_run saves nine registers and spills a few addresses; arguments behind the fourth are on the stack.
NET_RUN_BYTES = 96
REGISTER_ARGUMENTS, POINTER_BYTES = 4, 4

_FUNCTION = re.compile(r"^\s*\.type\s+(\S+?),\s*[%@]function")
_LABEL = re.compile(r"^([A-Za-z_$][\w$.]*):")
_INSTRUCTION = re.compile(r"^\s+([a-z][\w.]*)\s+([^@]*?)\s*(?:@.*)?$")
_LIST = re.compile(r"\{([^}]*)\}")
_WIDTHS = {"r": 4, "l": 4, "s": 4, "d": 8, "q": 16}  # r4, lr, s16, d8, q4


@dataclass
class _Frame:
    own: int
    callees: set[str]


def stack_needs(assembly: str) -> dict[str, int]:
    """Return function -> bytes of stack that it takes, with everything that it calls.

    Args:
        assembly: Of one module for a 32-bit Arm processor, as LLVM prints it.

    Raises:
        InternalError: It moves the stack pointer in a way that is not known here.
    """
    frames = _frames(assembly)
    found: dict[str, int] = {}

    def need(name: str, callers: tuple[str, ...]) -> int:
        if name in callers:
            msg = f"'{name}' calls itself"
            raise InternalError(msg)
        if name not in frames:
            return EXTERNAL_BYTES
        if name not in found:
            below = [need(callee, (*callers, name)) for callee in sorted(frames[name].callees)]
            found[name] = frames[name].own + max(below, default=0)
        return found[name]

    for name in frames:
        need(name, ())
    return found


def network_stack(calls: Sequence[tuple[str, int]], needs: Mapping[str, int]) -> int:
    """Return the bytes of stack below the caller of ``net_run``.

    Args:
        calls: (function, number of its arguments).
        needs: From ``stack_needs``, of all object files together.
    """
    passed = max((count - REGISTER_ARGUMENTS for _, count in calls), default=0)
    deepest = max((needs[function] for function, _ in calls), default=0)
    return NET_RUN_BYTES + POINTER_BYTES * max(passed, 0) + max(deepest, EXTERNAL_BYTES)


def _frames(assembly: str) -> dict[str, _Frame]:
    functions = {found[1] for line in assembly.splitlines() if (found := _FUNCTION.match(line))}
    frames: dict[str, _Frame] = {}
    frame: _Frame | None = None
    for line in assembly.splitlines():
        if (label := _LABEL.match(line)) and label[1] in functions:
            frame = frames[label[1]] = _Frame(0, set())
        elif frame is not None and (found := _INSTRUCTION.match(line)):
            mnemonic, operands = found[1].split(".")[0], found[2]
            # A "b" to a name is a tail call.
            if mnemonic in ("bl", "blx", "b") and not operands.startswith("."):
                frame.callees.add(operands)
            frame.own += _taken(mnemonic, operands)
    return frames


def _taken(mnemonic: str, operands: str) -> int:
    """Return the bytes by which an instruction lowers the stack pointer."""
    names = [operand.strip() for operand in operands.split(",")]
    if mnemonic in ("push", "vpush") or (mnemonic in ("stmdb", "stmfd", "vstmdb") and names[0] == "sp!"):
        return sum(_register_bytes(_LIST.findall(operands)[0]))
    if mnemonic == "str" and operands.endswith("]!") and "[sp" in operands:
        return -int(operands.split("#")[1].removesuffix("]!"))
    if mnemonic == "bfc" and names[1] == "#0":  # clears the low bits of what becomes the stack pointer
        return (1 << int(names[2].removeprefix("#"))) - 1
    if mnemonic in ("sub", "subw") and names[0] == "sp":
        if names[-1].startswith("#"):
            # From a frame pointer it is the way back.
            return 0 if len(names) == 3 and names[1] != "sp" else int(names[-1].removeprefix("#"))
        msg = f"machine code moves the stack pointer by '{mnemonic} {operands}'"
        raise InternalError(msg)
    return 0


def _register_bytes(listed: str) -> Iterator[int]:
    for part in (p.strip() for p in listed.split(",")):
        first, _, last = part.partition("-")
        count = int(last[1:]) - int(first[1:]) + 1 if last else 1
        yield count * _WIDTHS[first[0]]
