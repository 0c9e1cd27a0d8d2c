"""model.txt: what the C runtime must know of an artifact, as lines that need no JSON reader.

The form is described in runner/model_text.h, which reads it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np

from bitwright.compiler.bundle.segments import SegmentList
from bitwright.targets.toolchain.interface import Interface
from bitwright.targets.toolchain.shape_rules import PortRule, ShapeRules

MODEL_TEXT_FILE = "model.txt"
VERSION = 1
BLOCK_BYTES = 1 << 20


def model_text(
    interface: Interface,
    rules: ShapeRules | None,
    *,
    flags: Sequence[str],
    threads: int,
    library: Path | None,
    segments: SegmentList | None = None,
    device: str | None = None,
) -> str:
    """Return the content of model.txt.

    Args:
        interface: The artifact's static interface.
        rules: Its shapes, if it has several.
        flags: Processor features in the names of /proc/cpuinfo that its code needs.
        threads: Default number of threads.
        library: The shared library, for its size and checksum; None if the model is linked into the program.
            A library that is not there is left out, and the runtime says so.
        segments: What the artifact consists of if it is not one library.
        device: Where it runs, ``"cuda"``; None: on the processor.
    """
    lines = [f"bitwright-model {VERSION}"]
    if library is not None and library.exists():
        lines.append(f"library {quote(library.name)} {library.stat().st_size} {_checksum(library)}")
    if segments is not None:
        lines.append(f"onnxruntime {sum(s.executor == 'onnxruntime' for s in segments.segments)}")
    lines.append(" ".join(["processor", *flags]))
    lines.append(f"threads {threads}")
    if device is not None:
        lines.append(f"device {device}")
    lines += _static(interface) if rules is None else _dynamic(rules)
    return "\n".join([*lines, "end", ""])


def _static(interface: Interface) -> Iterator[str]:
    for kind, ports in (("input", interface.inputs), ("output", interface.outputs)):
        yield from (_port(kind, PortRule(name=p.name, dtype=p.dtype, dims=p.shape), {}) for p in ports)
    yield f"function {interface.function}"


def _dynamic(rules: ShapeRules) -> Iterator[str]:
    names = [*rules.buckets, *([rules.loop] if rules.loop else [])]
    given = len(rules.inputs) - rules.states
    for name in rules.buckets:
        kind = _kind(name, rules)
        yield f"dim {quote(name)} {kind} {' '.join(map(str, rules.buckets[name]))}"
    if rules.loop:
        yield f"dim {quote(rules.loop)} loop"
    numbers = {name: number for number, name in enumerate(names)}
    yield from (_port("input", port, numbers) for port in rules.inputs[:given])
    if rules.cache is not None:
        past = [port.name for port in rules.inputs].index(rules.cache.past)
        yield f"cache {past} {numbers[rules.cache.length]} {rules.cache.capacity}"
    yield from (_port("state", port, numbers) for port in rules.inputs[given:])
    yield from (_port("output", port, numbers) for port in rules.answers)
    for function in rules.functions:
        sizes = [function.sizes.get(name, 1 if name == rules.loop else 0) for name in names]
        yield " ".join(["function", function.name, *map(str, sizes)])


def _kind(name: str, rules: ShapeRules) -> str:
    if name != rules.dynamic:
        return "bucket"
    return "any" if rules.longest is None else f"upto {rules.longest}"


def _port(kind: str, port: PortRule, numbers: Mapping[str, int]) -> str:
    dims = [f"${numbers[d]}" if isinstance(d, str) else str(d) for d in port.dims]
    return " ".join([kind, quote(port.name), port.dtype, _pad(port), str(len(dims)), *dims])


def _pad(port: PortRule) -> str:
    if port.pad is None:
        return "-"
    if port.dtype == "float16":  # C has no such type: the runtime fills in the bits
        return str(int(np.float16(port.pad).view(np.uint16)))
    return repr(port.pad)


def _checksum(path: Path) -> int:
    value = 1
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            value = zlib.adler32(block, value)
    return value
