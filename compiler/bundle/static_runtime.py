"""What a bundle without a runtime tells its user: how to link the network into firmware."""

from __future__ import annotations

import json
from pathlib import Path

from bitwright.compiler.bundle.runtime import ShippedFile
from bitwright.compiler.lower.static_c.emit import (
    CONSTANTS_FILE,
    FLOAT_OBJECT_FILE,
    OBJECT_FILE,
    RECORD_FILE,
    SOURCE_FILE,
)
from bitwright.targets.toolchain.interface import Interface

CODE_FILES = (SOURCE_FILE, OBJECT_FILE, FLOAT_OBJECT_FILE, "support.c")
README = """# Linking this network into firmware or a program

No runtime, no allocation, no operating system:

    net.h              sizes, and the one function: int net_run(inputs, outputs)
    net.c              its calls, each with the ONNX nodes it covers, and the arena
    net_constants.c    weights and tables: const, so they stay in flash
    net_kernels.o      integer kernels as object code
    net_float.o        float operators as object code, if there are any
    support.c          rounding and memory functions, all weak: your C library's win

Compile the C files with your own options for the same processor and floating-point ABI (hard), link everything:

    #include "net.h"
    static float in[NET_INPUT_0_BYTES / 4] __attribute__((aligned(NET_ALIGNMENT)));
    static float out[NET_OUTPUT_0_BYTES / 4] __attribute__((aligned(NET_ALIGNMENT)));
    const void *inputs[NET_INPUTS] = {in};
    void *outputs[NET_OUTPUTS] = {out};
    if (net_run(inputs, outputs) != 0) ...

On a microcontroller, floating point (and Helium) must be enabled (CPACR); rounding to nearest must be on (the initial
state). The arena can be placed with -DNET_ARENA_SECTION='".your_section"'. net_run takes NET_STACK_BYTES of stack.
net.json holds the memory plan, call by call.

`runner` and `runner_traced` are the network with the harness; input_0, ... are raw little-endian arrays in the folder
it is started in. With harness.c and board.ld it runs on an emulated board, with linux_harness.c under 32-bit Linux:

    qemu-system-arm -M BOARD -nographic -semihosting-config enable=on,target=native -kernel runner
    qemu-arm -cpu PROCESSOR runner
"""


def add_static_runtime(lib: Path, interface: Interface) -> tuple[ShippedFile, ...]:
    """Complete the ``lib`` folder of a bundle whose network and programs are already there.

    Returns:
        What of it goes into the device's flash (under Linux: is loaded), in bytes of machine code.
    """
    interface.write(lib)
    (lib / "README.md").write_text(README)
    flash = json.loads((lib / RECORD_FILE).read_text()).get("flash")
    if flash is None:  # nothing was linked: the profile names neither a board nor an operating system
        return ()
    code = ", ".join(name for name in CODE_FILES if (lib / name).exists())
    return (
        ShippedFile(CONSTANTS_FILE, int(flash["constant_bytes"]), "model"),
        ShippedFile(code, int(flash["code_bytes"]), "model"),
    )
