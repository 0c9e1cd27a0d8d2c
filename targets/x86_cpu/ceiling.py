"""What this processor reaches at most: dot-product instructions from registers and from cache, and reading memory.

``python -m bitwright.targets.x86_cpu.ceiling JSON`` with ``{"target": FIELDS, "threads": N}`` prints a JSON record:
``instructions``: compute row -> ``registers`` and ``cached`` operations per second (a multiply-accumulate is two);
``levels``: name, bytes it holds, bytes per second read. TVM_NUM_THREADS must be N when the process starts.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.instruction import DotInstruction
from bitwright.compiler.lower.templates.scaffold import (
    Buffer,
    Expr,
    Parameter,
    allocate,
    build_function,
    load,
    loop,
    splat,
    store,
)
from bitwright.targets.x86_cpu import amx
from bitwright.targets.x86_cpu.avx2 import AVX2
from bitwright.targets.x86_cpu.native import processor_flags
from bitwright.targets.x86_cpu.vnni import VNNI

FLAGS = {amx.NAME: "amx_int8", VNNI.name: "avx512_vnni", AVX2.name: "avx2"}
# Register tile (activations, weight vectors) of the cached loops, as the kernels' own: all accumulators but a few.
TILES = {VNNI.name: (6, 4), AVX2.name: (3, 3)}
STEPS = 32
ROUNDS, ROUND_S = 12, 0.004
TILE_MACS, TILE_SIZE = 16 * 16 * 64, 1024
CACHE_FOLDER = Path("/sys/devices/system/cpu/cpu0/cache")
FALLBACK_CACHES = {2: 1 << 20, 3: 32 << 20}
MOST_MEMORY = 1 << 30
READ_LANES, READ_VECTORS = 16, 8

Body = Callable[[Expr, list[Buffer]], None]


@dataclass(frozen=True)
class Loop:
    """A loop to be timed.

    Attributes:
        parameters: Its buffers; the last one is written.
        body: Emits the work of one thread: (number of the thread, buffers).
        work: What one thread does in one call: multiply-accumulates or bytes.
    """

    parameters: tuple[Parameter, ...]
    body: Body
    work: int


def register_loop(instruction: DotInstruction, threads: int, times: int) -> Loop:
    """Return products of operands that stay in registers: as many chains as there are accumulators."""
    pixels, vectors = TILES[instruction.name]
    chains, lanes = pixels * vectors, instruction.lanes

    def body(thread: Expr, buffers: list[Buffer]) -> None:
        x, w, y = buffers
        total = _sums(chains * lanes, lanes, start=1)
        with T.serial(times):
            for k in range(chains):
                old = load(total, [k * lanes], lanes)
                store(total, _add_product(instruction, old, x, w), [k * lanes], lanes)
        _copy(total, y, thread * chains * lanes, chains * lanes, lanes)

    work = times * chains * lanes * instruction.step
    return Loop(_parameters(instruction, 64, 64, threads * chains * lanes), body, work)


def _add_product(instruction: DotInstruction, accumulator: Expr, x: Buffer, w: Buffer) -> Expr:
    """Return the accumulator after one product of operands that are in registers."""
    weights = load(w, [0], instruction.lanes * instruction.step)
    if instruction.name != AVX2.name:
        return instruction.emit(accumulator, load(x, [0], instruction.step), weights)
    # Multiplying and adding are two instructions here: of operands that never change, LLVM would multiply once.
    changing = T.reinterpret(accumulator, dtype="int16x16")
    product = T.call_llvm_pure_intrin(
        "llvm.x86.avx2.pmadd.wd", changing, T.cast(weights, "int16x16"), dtype="int32x8"
    )
    return accumulator + product


def cached_loop(instruction: DotInstruction, threads: int, times: int) -> Loop:
    """Return the inner loop of a matrix product whose panels lie in the first-level cache."""
    pixels, vectors = TILES[instruction.name]
    lanes, step = instruction.lanes, instruction.step

    def body(thread: Expr, buffers: list[Buffer]) -> None:
        x, w, y = buffers
        total = _sums(pixels * vectors * lanes, lanes)
        with T.serial(times), loop(STEPS) as at:
            weights = [load(w, [(at * vectors + v) * lanes * step], lanes * step) for v in range(vectors)]
            for p in range(pixels):
                given = load(x, [(p * STEPS + at) * step], step)
                for v in range(vectors):
                    place = (p * vectors + v) * lanes
                    store(
                        total,
                        instruction.emit(load(total, [place], lanes), given, weights[v]),
                        [place],
                        lanes,
                    )
        _copy(total, y, thread * pixels * vectors * lanes, pixels * vectors * lanes, lanes)

    sizes = (pixels * STEPS * step, STEPS * vectors * lanes * step, threads * pixels * vectors * lanes)
    return Loop(_parameters(instruction, *sizes), body, times * STEPS * pixels * vectors * lanes * step)


def _parameters(instruction: DotInstruction, x: int, w: int, y: int) -> tuple[Parameter, ...]:
    return (
        Parameter("x", (x,), instruction.operand),
        Parameter("w", (w,), "int8"),
        Parameter("y", (y,), "int32"),
    )


def _sums(length: int, lanes: int, start: int = 0) -> Buffer:
    total = allocate((length,), "int32", "local")
    for k in range(0, length, lanes):
        store(total, splat(T.int32(start), lanes), [k], lanes)
    return total


def _copy(source: Buffer, target: Buffer, at: Expr, length: int, lanes: int) -> None:
    for k in range(0, length, lanes):
        store(target, load(source, [k], lanes), [at + k], lanes)


def tile_loop(threads: int, times: int, *, loads: bool) -> Loop:
    """Return tile products, 2 x 2 tiles at once, with or without loading the operands from cache each time."""
    steps = 8

    def fetch(x: Buffer, w: Buffer, at: Expr) -> None:
        for k, (buffer, first) in enumerate([(x, 4), (x, 4), (w, 6), (w, 6)]):
            address = T.address_of(buffer[(at * 2 + k % 2) * TILE_SIZE])
            _tile("tileloadd64", T.int8(first + k % 2), address, T.int64(64))

    def multiply() -> None:
        for k in range(4):
            _tile("tdpbusd", T.int8(k), T.int8(4 + k // 2), T.int8(6 + k % 2))

    def body(thread: Expr, buffers: list[Buffer]) -> None:
        x, w, config, y = buffers
        saved = T.address_of(y[thread * 5 * TILE_SIZE // 4 + TILE_SIZE])
        _tile("sttilecfg", saved)
        _tile("ldtilecfg", T.address_of(config[0]))
        for k in range(4):
            _tile("tilezero", T.int8(k))
        fetch(x, w, 0)
        with T.serial(times), loop(steps) as at:
            if loads:
                fetch(x, w, at)
            multiply()
        for k in range(4):
            place = T.address_of(y[thread * 5 * TILE_SIZE // 4 + k * TILE_SIZE // 4])
            _tile("tilestored64", T.int8(k), place, T.int64(64))
        _tile("ldtilecfg", saved)

    parameters = (
        Parameter("x", (steps * 2 * TILE_SIZE,), "uint8"),
        Parameter("w", (steps * 2 * TILE_SIZE,), "int8"),
        Parameter("config", (64,), "uint8"),
        Parameter("y", (threads * 5 * TILE_SIZE // 4,), "int32"),
    )
    return Loop(parameters, body, times * steps * 4 * TILE_MACS)


def _tile(name: str, *operands: Expr) -> None:
    T.evaluate(T.call_llvm_intrin(f"llvm.x86.{name}", *operands, dtype="void"))


def read_loop(threads: int, size: int, times: int) -> Loop:
    """Return the sum of ``size`` bytes a thread, several accumulators at once."""
    width = READ_LANES * READ_VECTORS
    count = size // 4 // width * width

    def body(thread: Expr, buffers: list[Buffer]) -> None:
        x, y = buffers
        total = _sums(width, READ_LANES)
        with T.serial(times), loop(count // width) as at:
            for k in range(0, width, READ_LANES):
                found = load(x, [thread * count + at * width + k], READ_LANES)
                store(total, load(total, [k], READ_LANES) + found, [k], READ_LANES)
        _copy(total, y, thread * width, width, READ_LANES)

    parameters = (Parameter("x", (threads * count,), "int32"), Parameter("y", (threads * width,), "int32"))
    return Loop(parameters, body, times * count * 4)


def compile_loop(
    made: Loop, threads: int, target: dict[str, Any]
) -> tuple[Callable[[], object], Callable[[], np.ndarray]]:
    """Compile a loop; every thread runs its body.

    Returns:
        The call, and what reads the buffer that it writes.
    """

    def emit(buffers: list[Buffer]) -> None:
        with loop(threads, parallel=threads > 1) as thread:
            made.body(thread, buffers)

    function = build_function(made.parameters, emit).with_attr("global_symbol", "ceiling")
    compiled = tvm.compile(tvm.IRModule({"ceiling": function}), target=tvm.target.Target(target))["ceiling"]
    tensors = [tvm.runtime.tensor(_contents(p)) for p in made.parameters]
    return lambda: compiled(*tensors), lambda: np.asarray(tensors[-1].numpy())


def _contents(parameter: Parameter) -> np.ndarray:
    """Return small numbers, or the tile configuration: four tiles of sums, two of activations, two of weights."""
    if parameter.name == "config":
        config = np.zeros(64, np.uint8)
        config[0] = 1
        config[16:32].view(np.uint16)[:] = 64
        config[48:56] = 16
        return config
    return np.ones(parameter.shape, parameter.dtype)


def measured_rate(make: Callable[[int], Loop], threads: int, target: dict[str, Any]) -> float:
    """Return work per second of all threads: the best of many rounds, each long enough for the clock."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    times, seconds = 1, 0.0
    while seconds < ROUND_S:
        made = make(times)
        call, _ = compile_loop(made, threads, target)
        seconds = min(_seconds(call, clock) for _ in range(3))
        times = (
            times * max(2, min(64, int(1.2 * ROUND_S / max(seconds, 1e-7)))) if seconds < ROUND_S else times
        )
    return made.work * threads / min(_seconds(call, clock) for _ in range(ROUNDS))


def _seconds(call: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    call()
    return clock() - start


@dataclass(frozen=True)
class Level:
    """A level of memory: ``bytes`` it holds for one thread, ``bytes_per_s`` all threads read together."""

    name: str
    bytes: int
    bytes_per_s: float


def _caches() -> dict[int, int]:
    """Return level -> bytes of the data caches, as the system tells."""
    found = dict(FALLBACK_CACHES)
    for folder in sorted(CACHE_FOLDER.glob("index*")):
        kind, size = ((folder / name).read_text().strip() for name in ("type", "size"))
        if kind != "Instruction" and size.endswith("K"):
            found[int((folder / "level").read_text())] = int(size[:-1]) * 1024
    return found


def _levels(threads: int, target: dict[str, Any]) -> Iterator[Level]:
    """Measure the second-level cache, the last one and memory."""
    caches = _caches()
    memory = min(MOST_MEMORY, 4 * caches[3])
    for name, holds, read in (
        ("l2", caches[2], caches[2] // 2),
        ("l3", caches[3] // threads, min(8 * caches[2], caches[3] // 2) // threads),
        ("memory", 1 << 62, memory // threads),
    ):
        yield Level(name, holds, measured_rate(partial(read_loop, threads, read), threads, target))


def measure(threads: int, target: dict[str, Any]) -> dict[str, Any]:
    """Return the record that the module's text describes."""
    flags = processor_flags()
    found: dict[str, dict[str, float]] = {}
    makers: dict[str, tuple[Callable[[int], Loop], ...]] = {
        i.name: (partial(register_loop, i, threads), partial(cached_loop, i, threads)) for i in (VNNI, AVX2)
    }
    makers[amx.NAME] = (partial(tile_loop, threads, loads=False), partial(tile_loop, threads, loads=True))
    for name, (registers, cached) in makers.items():
        if FLAGS[name] in flags:
            found[name] = {
                "registers": 2 * measured_rate(registers, threads, target),
                "cached": 2 * measured_rate(cached, threads, target),
            }
    return {"instructions": found, "levels": [asdict(level) for level in _levels(threads, target)]}


def main() -> None:
    """Measure what the argument asks for."""
    from bitwright.compiler.lower.loaded import ask_for_tiles

    ask_for_tiles()
    wanted = json.loads(sys.argv[1])
    print(json.dumps(measure(wanted["threads"], wanted["target"])))


if __name__ == "__main__":
    main()
