"""What an FPGA has: the cells of the device and what circuits cost in them."""

from __future__ import annotations

from typing import Literal

from bitwright.targets.sections.record import Count, Share, Strict


class FpgaDevice(Strict):
    """The device, in cells of its own kind.

    Attributes:
        series: Which synthesis script and cost table apply.
        part: The part as place and route names it, e.g. ``85k``.
        package: As place and route names it.
        speed_grade: Of the device; place and route's default without it.
        luts, ffs, dsps, brams: Cells of the device.
        bram_bits: Bits of one block RAM.
        costs: Cost table that ``bitwright targets probe`` wrote, instead of the shipped one of the series.
        utilisation: Share of the cells that a design may use.
    """

    series: Literal["ecp5", "xilinx7"]
    part: str
    package: str
    speed_grade: Count | None = None
    luts: Count
    ffs: Count
    dsps: Count
    brams: Count
    bram_bits: Count
    utilisation: Share = 0.7
    costs: str | None = None
