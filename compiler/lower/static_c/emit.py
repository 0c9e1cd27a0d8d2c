"""The C source of a static network: a header, the calls, and the constants."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from bitwright.compiler.lower.static_c.arena import ALIGNMENT
from bitwright.compiler.lower.static_c.network import Call, MemoryPlan, Network, Place, tensor_bytes
from bitwright.compiler.program.ops import Tensor

HEADER_FILE, SOURCE_FILE, CONSTANTS_FILE = "net.h", "net.c", "net_constants.c"
OBJECT_FILE, FLOAT_OBJECT_FILE, RECORD_FILE = "net_kernels.o", "net_float.o", "net.json"
SOURCE_WIDTH = 110
_C_TYPES = {1: "uint8_t", 2: "uint16_t", 4: "uint32_t", 8: "uint64_t"}

_HEADER = """/* {title}. Inputs and outputs are the caller's, aligned to NET_ALIGNMENT bytes. */
#ifndef NET_H
#define NET_H

#include <stdint.h>

#define NET_ALIGNMENT {alignment}
#define NET_ARENA_BYTES {arena}
#define NET_STACK_BYTES {stack} /* of net_run and everything that it calls */
#define NET_IO_BYTES {io} /* all inputs and outputs, each rounded up to NET_ALIGNMENT */
#define NET_INPUTS {inputs}
#define NET_OUTPUTS {outputs}
#define NET_INPUT_BYTES {{{input_bytes}}}
#define NET_OUTPUT_BYTES {{{output_bytes}}}
{ports}
/* Computes the outputs from the inputs. Returns 0, or 1 if a pointer is not aligned; not reentrant: one arena. */
int net_run(const void *const *inputs, void *const *outputs);

#ifdef NET_TRACE
/* Called behind every integer kernel for each of its activations and for its output; the caller defines it. */
void net_trace(const void *data, uint32_t bytes);
#endif

#endif
"""

_SOURCE = """/* {title}. */
#include "net.h"

#ifndef NET_ARENA_SECTION
#define NET_ARENA_SECTION ".bss.net_arena"
#endif

/* Every intermediate value and scratch buffer. Buffers that are alive together do not overlap. */
uint8_t net_arena[{arena}] __attribute__((aligned({alignment}), section(NET_ARENA_SECTION)));

{constants}

{functions}

static int is_unaligned(const void *pointer) {{ return ((uintptr_t)pointer & (NET_ALIGNMENT - 1)) != 0; }}

#ifdef NET_TRACE
#define TRACE(pointer, bytes) net_trace(pointer, bytes)
#else
#define TRACE(pointer, bytes) ((void)0)
#endif

int net_run(const void *const *inputs, void *const *outputs)
{{
    for (int i = 0; i < NET_INPUTS; ++i)
        if (is_unaligned(inputs[i])) return 1;
    for (int i = 0; i < NET_OUTPUTS; ++i)
        if (is_unaligned(outputs[i])) return 1;
{calls}
    return 0;
}}
"""


def comment(text: str) -> str:
    """Return text that cannot end a C comment, whatever names a model has."""
    plain = "".join(c if c.isascii() and c.isprintable() else "?" for c in text)
    return plain.replace("*/", "* /").replace("/*", "/ *").replace("\\", "/")


def header(network: Network, plan: MemoryPlan, title: str) -> str:
    """Return the text of net.h."""
    named = [
        f"#define NET_{kind}_{k}_BYTES {tensor_bytes(tensor)} /* {comment(_port(tensor))} */\n"
        for kind, tensors in (("INPUT", network.inputs), ("OUTPUT", network.outputs))
        for k, tensor in enumerate(tensors)
    ]
    return _HEADER.format(
        title=comment(title),
        alignment=ALIGNMENT,
        arena=plan.arena.size,
        stack=plan.stack_bytes,
        io=plan.io_bytes,
        inputs=len(network.inputs),
        outputs=len(network.outputs),
        input_bytes=", ".join(str(tensor_bytes(t)) for t in network.inputs) or "0",
        output_bytes=", ".join(str(tensor_bytes(t)) for t in network.outputs) or "0",
        ports="".join(named),
    )


def source(network: Network, plan: MemoryPlan, title: str) -> str:
    """Return the text of net.c."""
    arity = {call.function: len(call.arguments) for call in network.calls}
    functions = [f"extern int32_t {name}({', '.join(['const void *'] * n)});" for name, n in arity.items()]
    constants = [f"extern {_declaration(k, c)};" for k, c in enumerate(network.constants)]
    calls = [_call_text(network, plan, k, call) for k, call in enumerate(network.calls)]
    copies = [
        f"    __builtin_memcpy(outputs[{k}], {_pointer(place, plan)}, {tensor_bytes(network.outputs[k])});"
        for place, k in network.copies
    ]
    return _SOURCE.format(
        title=comment(title),
        arena=max(plan.arena.size, ALIGNMENT),
        alignment=ALIGNMENT,
        constants="\n".join(constants),
        functions="\n".join(functions),
        calls="\n".join([*calls, *copies]),
    )


def constants_source(network: Network, title: str) -> str:
    """Return the text of net_constants.c: bit patterns, so that nothing is rounded on the way."""
    parts = [f"/* {comment(title)}: weights, biases, multipliers, tables. */\n#include <stdint.h>\n"]
    for number, array in enumerate(network.constants):
        words = _words(array)
        about = f"/* {array.dtype.name} {list(array.shape)} */\n"
        declared = _declaration(number, array)
        parts.append(f"{about}extern {declared};\n{declared} = {{\n{_lines(words)}\n}};\n")
    return "\n".join(parts)


def record(network: Network, plan: MemoryPlan) -> str:
    """Return the text of net.json: the memory plan, and what a trace holds, for the executor of an emulated board."""
    calls: list[dict[str, Any]] = [
        {
            "function": call.function,
            "label": call.label,
            "live_bytes": plan.live[k] if k < len(plan.live) else 0,
            "recorded": [asdict(r) for r in call.recorded],
        }
        for k, call in enumerate(network.calls)
    ]
    memory = {
        "ram_bytes": plan.ram_bytes,
        "arena_bytes": plan.arena.size,
        "live_bytes": plan.arena.lower_bound,
        "io_bytes": plan.io_bytes,
        "stack_bytes": plan.stack_bytes,
        "constant_bytes": plan.constant_bytes,
    }
    return json.dumps({"memory": memory, "calls": calls}, indent=1) + "\n"


def _call_text(network: Network, plan: MemoryPlan, number: int, call: Call) -> str:
    arguments = ", ".join(_pointer(place, plan) for place in call.arguments)
    live = plan.live[number] if number < len(plan.live) else 0
    lines = [
        f"\n    /* {number}: {comment(call.label)}; {live} bytes of the arena in use */",
        f"    {call.function}({arguments});",
    ]
    for traced in call.recorded:
        size = int(np.prod(traced.shape, dtype=np.int64)) * np.dtype(traced.dtype).itemsize
        lines.append(f"    TRACE({_pointer(call.arguments[traced.argument], plan)}, {size});")
    return "\n".join(lines)


def _pointer(place: Place, plan: MemoryPlan) -> str:
    if place.kind == "buffer":
        return f"net_arena + {plan.offset(place.index)}"
    if place.kind == "constant":
        return f"net_constant_{place.index}"
    return f"{place.kind}s[{place.index}]"


def _port(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} '{tensor.name}'"


def _words(array: np.ndarray) -> np.ndarray:
    contiguous = np.ascontiguousarray(array).reshape(-1)
    return contiguous.view(np.dtype(_C_TYPES[array.dtype.itemsize].removesuffix("_t")))


def _declaration(number: int, array: np.ndarray) -> str:
    kind = _C_TYPES[array.dtype.itemsize]
    return f"const {kind} net_constant_{number}[{max(array.size, 1)}] __attribute__((aligned({ALIGNMENT})))"


def _lines(words: Sequence[int] | np.ndarray) -> str:
    texts = [str(word) for word in words.tolist()] if isinstance(words, np.ndarray) else list(map(str, words))
    lines, line = [], "   "
    for text in texts:
        if len(line) + len(text) + 2 > SOURCE_WIDTH:
            lines.append(line)
            line = "   "
        line += f" {text},"
    return "\n".join([*lines, line])
