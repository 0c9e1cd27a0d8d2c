"""What an engine takes before it is synthesized: counts of its parts times what such a part was measured to take.

The parts follow from an engine's parameters: lanes, bits of adders, accumulators, memories. Memories are mapped by the
rules that yosys follows; the rest is a sum with the coefficients of a table in ``costs/``, fitted to synthesized
engines by ``bitwright targets probe``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from pathlib import Path
from typing import Literal

from bitwright.compiler.errors import ProfileError
from bitwright.targets.fpga.cells import Cells, Series
from bitwright.targets.fpga.cost_table import CostTable, MemoryRules, check_series, read_table
from bitwright.targets.fpga.network import Engine
from bitwright.targets.sections.fpga import FpgaDevice

FOLDER = Path(__file__).parent / "costs"
Amounts = dict[str, float]
KIND_NAMES = {1: "ternary", 2: "binary"}
INTEGER = 0
MEASURED_ROW = 9


@dataclass(frozen=True)
class MemoryShape:
    """A memory inside an engine.

    Attributes:
        width: Bits of a word.
        depth: Words.
        kind: ``rom``: read only. ``ram``: written by one side, read by the other.
    """

    width: int
    depth: int
    kind: Literal["rom", "ram"]


@dataclass(frozen=True)
class Parts:
    """What an engine consists of.

    Attributes:
        amounts: Part -> how much of it there is.
        memories: Memories.
        dsps: Multiplier blocks; exact.
    """

    amounts: Mapping[str, float]
    memories: tuple[MemoryShape, ...]
    dsps: int


@lru_cache
def cost_table(series: Series) -> CostTable:
    """Return the shipped table of a series."""
    return read_table(FOLDER / f"{series}.yaml")


def table_of(device: FpgaDevice) -> CostTable:
    """Return the table of a device: its profile's own, or the shipped one.

    Raises:
        ProfileError: The profile's own is missing, broken, or of another series.
    """
    if device.costs is None:
        return cost_table(device.series)
    return check_series(read_table(Path(device.costs)), device.series)


def predict(engine: Engine, table: CostTable) -> Cells:
    """Return what an engine is predicted to take."""
    return cells_of(parts_of(engine.module, engine.parameters), table)


def cells_of(parts: Parts, table: CostTable) -> Cells:
    """Return what parts take by a table."""
    luts = sum(table.luts.get(name, 0.0) * amount for name, amount in parts.amounts.items())
    ffs = sum(table.ffs.get(name, 0.0) * amount for name, amount in parts.amounts.items())
    stored = [mapped(memory, table.memories) for memory in parts.memories]
    memories = Cells()
    for one in stored:
        memories += one
    return Cells(luts, ffs, parts.dsps) + memories


def mapped(memory: MemoryShape, rules: MemoryRules) -> Cells:
    """Return what a memory takes: block RAMs if it fills them well enough, else look-up tables."""
    width, depth = memory.width, memory.depth
    below = ceil(depth / rules.words)
    blocks = ceil(width * below * rules.words / rules.bits)
    if memory.kind == "rom":
        if width * depth < rules.rom_share * blocks * rules.bits:
            return Cells(luts=width * max(1.0, depth / rules.rom_depth), ffs=width)
        uneven = below if depth & (depth - 1) else 1
        return Cells(luts=width * rules.deep_choosing * (uneven - 1), brams=blocks)
    rows = ceil(depth / rules.ram_depth)
    if rows * width / rules.ram_width >= rules.ram_pieces * blocks:
        return Cells(luts=rules.around_ram * width, brams=blocks)
    pieces = ceil(width / rules.ram_width) * rows
    return Cells(luts=pieces * rules.ram_luts + width * (rows - 1) * rules.ram_choosing, ffs=width)


def parts_of(module: str, parameters: Mapping[str, int]) -> Parts:
    """Return what an instance of a module under ``rtl/`` consists of.

    Raises:
        ProfileError: No costs are known of such a module.
    """
    count = _PARTS.get(module)
    if count is None:
        msg = f"no costs are known of the module '{module}'"
        raise ProfileError(msg, where="cost table", fix=f"known: {', '.join(_PARTS)}")
    return count(parameters)


def bits_of(largest: int) -> int:
    """Return ``$clog2`` of a count, at least 1."""
    return max(1, (largest - 1).bit_length())


def tree_bits(count: int, width: int) -> int:
    """Return the bits of all adders of a tree of ``count`` terms."""
    total = 0
    while count > 1:
        width += 1
        total += count // 2 * width
        count = (count + 1) // 2
    return total


def _product(p: Mapping[str, int]) -> int:
    return p["ACT_BITS"] + (p["WEIGHT_BITS"] if p["KIND"] == INTEGER else 1)


def _in_dsp(p: Mapping[str, int]) -> bool:
    return bool(p["DSP"]) and p["KIND"] == INTEGER


def lane_name(p: Mapping[str, int]) -> str:
    """Return the part that one multiplier is."""
    if _in_dsp(p):
        return "lane in dsp"
    return f"lane {KIND_NAMES.get(p['KIND'], p['WEIGHT_BITS'])}"


def _drain(p: Mapping[str, int], channels: int) -> tuple[Counter[str], list[MemoryShape], int]:
    """Return the parts behind the accumulators: holding, requantization, the output buffer."""
    lanes, acc, bits = p["LANES"], p["ACC_BITS"], p["MULT_BITS"]
    field = acc + bits + p["SHIFT_BITS"]
    found = Counter({"biased bits": lanes * acc})
    memories = [
        MemoryShape(lanes * field, channels // lanes, "rom"),
        MemoryShape(lanes * p["OUT_BITS"], p["FIFO"], "ram"),
    ]
    if p["PE"] > lanes:
        found["shifted bits"] = p["PE"] * acc
    if bits == 0:
        return found, memories, 0
    return found + _requantizers(lanes, p), memories, lanes * requantizer_dsps(acc)


def _requantizers(lanes: int, p: Mapping[str, int]) -> Counter[str]:
    """Return the parts of ``lanes`` requantizing circuits."""
    wide = max(10, p["ACC_BITS"] + p["MULT_BITS"] + 1 - (p["SHIFT_MIN"] - 1))
    return Counter(
        {
            "requantizers": lanes,
            "scaled bits": lanes * wide,
            "chosen shift bits": lanes * wide * p.get("SHIFT_BITS", 0),
            "product bits": lanes * (p["ACC_BITS"] + p["MULT_BITS"]),
        }
    )


def requantizer_dsps(acc_bits: int) -> int:
    """Return the multiplier blocks of one requantization: an accumulator of more than 18 bits is cut in two."""
    return 2 if acc_bits > 18 else 1


def _dot(
    p: Mapping[str, int], lanes: int, simd: int, words: int, channels: int
) -> tuple[Amounts, list[MemoryShape], int]:
    parts, memories, dsps = _drain(p, channels)
    product = _product(p)
    if _in_dsp(p):
        parts["product bits in dsp"] += lanes * product
        dsps += lanes
    parts["tree bits"] += p["PE"] * tree_bits(simd, product)
    parts["accumulator bits"] += p["PE"] * p["ACC_BITS"]
    parts["input bits"] += simd * p["ACT_BITS"]
    parts["weight bits"] += lanes * p["WEIGHT_BITS"]
    parts["address bits"] += bits_of(words)
    memories.append(MemoryShape(lanes * p["WEIGHT_BITS"], words, "rom"))
    # Tables are measured with inputs of 8 bits; in LUTs a lane is rows of adders, one bit wider than its input.
    share = 1.0 if _in_dsp(p) else (p["ACT_BITS"] + 1) / MEASURED_ROW
    return {**parts, lane_name(p): lanes * share}, memories, dsps


def _matrix_vector(p: Mapping[str, int]) -> Parts:
    beats, folds = p["IN"] // p["SIMD"], p["OUT"] // p["PE"]
    amounts, memories, dsps = _dot(p, p["PE"] * p["SIMD"], p["SIMD"], beats * folds, p["OUT"])
    if folds > 1:
        memories.append(MemoryShape(p["SIMD"] * p["ACT_BITS"], beats, "ram"))
        amounts["replayed bits"] = p["SIMD"] * p["ACT_BITS"]
    return Parts(amounts | {"matrix_vector": 1}, tuple(memories), dsps)


def _depthwise(p: Mapping[str, int]) -> Parts:
    words = p["CHANNELS"] // p["PE"] * p["TAPS"]
    amounts, memories, dsps = _dot(p, p["PE"], 1, words, p["CHANNELS"])
    amounts["input bits"] = p["PE"] * p["ACT_BITS"]
    return Parts(amounts | {"depthwise": 1}, tuple(memories), dsps)


def _sliding_window(p: Mapping[str, int]) -> Parts:
    total = p["ROWS"] * p["W"] * p["GROUPS"]
    memories = (
        MemoryShape(p["LANES"] * p["ACT_BITS"], total, "ram"),
        MemoryShape(p["LANES"] * p["ACT_BITS"], 16, "ram"),
    )
    amounts = {
        "ring address bits": float(bits_of(total)),
        "ring bits": float(p["LANES"] * p["ACT_BITS"]),
        "sliding_window": 1.0,
    }
    return Parts(amounts, memories, 0)


def _queue(depth: int, width: int) -> tuple[Amounts, MemoryShape]:
    return {"queue bits": float(width)}, MemoryShape(width, depth, "ram")


def _stream_fifo(p: Mapping[str, int]) -> Parts:
    amounts, memory = _queue(p["DEPTH"], p["WIDTH"])
    return Parts(amounts | {"stream_fifo": 1, "counter bits": bits_of(p["DEPTH"])}, (memory,), 0)


def _stream_add(p: Mapping[str, int]) -> Parts:
    amounts, memory = _queue(16, p["LANES"] * 8)
    return Parts(amounts | {"stream_add": 1, "adding lanes": p["LANES"]}, (memory,), 2 * p["LANES"])


def _stream_table(p: Mapping[str, int]) -> Parts:
    amounts, memory = _queue(8, p["LANES"] * 8)
    tables = tuple(MemoryShape(8, 256, "rom") for _ in range(p["LANES"]))
    return Parts(amounts | {"stream_table": 1}, (memory, *tables), 0)


def _stream_concat(p: Mapping[str, int]) -> Parts:
    return Parts({"stream_concat": 1, "switched bits": p["LANES"] * 8}, (), 0)


def _stream_widen(p: Mapping[str, int]) -> Parts:
    return Parts({"stream_widen": 1, "widened bits": p["WIDTH"] * p["RATIO"]}, (), 0)


def _stream_narrow(p: Mapping[str, int]) -> Parts:
    return Parts({"stream_narrow": 1, "narrowed bits": p["WIDTH"] * p["RATIO"]}, (), 0)


def _stream_fork(p: Mapping[str, int]) -> Parts:
    return Parts({"stream_fork": p["COUNT"]}, (), 0)


def _pool_maximum(p: Mapping[str, int]) -> Parts:
    amounts, memory = _queue(8, p["LANES"] * 8)
    return Parts(amounts | {"pool_maximum": 1, "compared bits": p["LANES"] * 8}, (memory,), 0)


def _pool_global_average(p: Mapping[str, int]) -> Parts:
    amounts, memory = _queue(16, p["LANES"] * 8)
    sums = MemoryShape(p["ACC_BITS"], p["GROUPS"], "ram")
    found = Counter(amounts) + _requantizers(p["LANES"], p)
    found["summed bits"] = p["LANES"] * p["ACC_BITS"]
    dsps = p["LANES"] * requantizer_dsps(p["ACC_BITS"])
    return Parts(dict(found) | {"pool_global_average": 1}, (memory, *(sums for _ in range(p["LANES"]))), dsps)


_PARTS: Mapping[str, Callable[[Mapping[str, int]], Parts]] = {
    "matrix_vector": _matrix_vector,
    "depthwise": _depthwise,
    "sliding_window": _sliding_window,
    "stream_fifo": _stream_fifo,
    "stream_add": _stream_add,
    "stream_table": _stream_table,
    "stream_concat": _stream_concat,
    "stream_widen": _stream_widen,
    "stream_narrow": _stream_narrow,
    "stream_fork": _stream_fork,
    "pool_maximum": _pool_maximum,
    "pool_global_average": _pool_global_average,
}
