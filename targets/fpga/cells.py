"""What synthesis counts: cells by type, added up to the four kinds that devices are sold by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Literal

Series = Literal["ecp5", "xilinx7"]

# Look-up tables that one cell takes: a carry cell of ECP5 sits in two of them, distributed RAM of 16 x 4 in four and
# in the two that write it; Xilinx has its carry chains beside the tables.
_LUTS: Mapping[Series, Mapping[str, int]] = {
    "ecp5": {"LUT4": 1, "CCU2C": 2, "TRELLIS_DPR16X4": 6},
    "xilinx7": {
        **{f"LUT{k}": 1 for k in range(1, 7)},
        **dict.fromkeys(("SRL16E", "SRLC32E", "RAM64X1S", "RAM32X1S"), 1),
        **dict.fromkeys(("RAM32X1D", "RAM64X1D"), 2),
        **dict.fromkeys(("RAM32M", "RAM64M", "RAM128X1D"), 4),
        **dict.fromkeys(("RAM32M16", "RAM64M8"), 8),
    },
}
_FFS: Mapping[Series, tuple[str, ...]] = {
    "ecp5": ("TRELLIS_FF",),
    "xilinx7": ("FDRE", "FDSE", "FDCE", "FDPE"),
}
_DSPS: Mapping[Series, tuple[str, ...]] = {"ecp5": ("MULT18X18D",), "xilinx7": ("DSP48E1",)}
# In block RAMs of 18 kbit.
_BRAMS: Mapping[Series, Mapping[str, int]] = {
    "ecp5": {"DP16KD": 1, "PDPW16KD": 1},
    "xilinx7": {"RAMB18E1": 1, "RAMB36E1": 2},
}


@dataclass(frozen=True)
class Cells:
    """How much of a device a circuit takes; predictions may be fractions.

    Attributes:
        luts: Look-up tables of four (ECP5) or six (Xilinx 7) inputs, carry cells and distributed RAM included.
        ffs: Flip-flops.
        dsps: Multiplier blocks.
        brams: Block RAMs of 18 kbit.
    """

    luts: float = 0
    ffs: float = 0
    dsps: float = 0
    brams: float = 0

    def __add__(self, other: Cells) -> Cells:
        """Return both together."""
        return Cells(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def dominates(self, other: Cells) -> bool:
        """Tell whether this takes no more of anything, and less of something."""
        pairs = list(zip(astuple(self), astuple(other), strict=True))
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def count_cells(by_type: Mapping[str, int], series: Series) -> Cells:
    """Return the cells of a synthesized circuit.

    Args:
        by_type: Type of a cell -> how many there are, as yosys counts them.
        series: What it was synthesized for.
    """
    return Cells(
        luts=sum(each * by_type.get(name, 0) for name, each in _LUTS[series].items()),
        ffs=sum(by_type.get(name, 0) for name in _FFS[series]),
        dsps=sum(by_type.get(name, 0) for name in _DSPS[series]),
        brams=sum(each * by_type.get(name, 0) for name, each in _BRAMS[series].items()),
    )
