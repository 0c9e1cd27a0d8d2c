"""Tables of costs: what parts of engines take in the cells of one series of devices, and where that was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml

from bitwright.compiler.errors import ProfileError
from bitwright.targets.schema_errors import plain, validated
from bitwright.targets.sections.record import Count, NonNegative, Positive, Share, Strict
from bitwright.targets.yaml_reader import read_file

LARGEST_FILE = 1 << 20


class MemoryRules(Strict):
    """Where synthesis puts memories.

    Attributes:
        bits: Bits of one block RAM.
        words: Words of one block RAM at its greatest width.
        rom_share: A read-only memory that would fill less of its blocks goes into look-up tables.
        rom_depth: Words of a read-only memory that one look-up table holds for each bit.
        deep_choosing: Look-up tables that choose between two blocks below each other, a bit.
        ram_width, ram_depth, ram_luts: One piece of distributed RAM, and the look-up tables of it.
        ram_pieces: From so many pieces a block on, a memory goes into block RAM.
        ram_choosing: Look-up tables that choose between two such pieces, a bit.
        around_ram: Look-up tables around a block RAM that is written, for each bit of its width.
    """

    bits: Count
    words: Count
    rom_share: Share
    rom_depth: Count
    deep_choosing: NonNegative
    ram_width: Count
    ram_depth: Count
    ram_luts: Count
    ram_pieces: Positive
    ram_choosing: NonNegative
    around_ram: NonNegative


class CostTable(Strict):
    """The table of one series.

    Attributes:
        series: Whose cells are counted.
        tool: What synthesized the engines.
        date: ISO date.
        engines: Engines that the coefficients were fitted to.
        error: Median relative error of predicted look-up tables over these.
        note: What a reader should know about where the figures come from.
        luts, ffs: Part -> cells of one of it.
        memories: Where memories go.
    """

    series: Literal["ecp5", "xilinx7"]
    tool: str
    date: str
    engines: Count
    error: NonNegative
    note: str = ""
    luts: dict[str, NonNegative]
    ffs: dict[str, NonNegative]
    memories: MemoryRules


def read_table(path: Path) -> CostTable:
    """Read a table.

    Raises:
        ProfileError: It is missing or breaks a rule.
    """
    root = read_file(path, path.name, limit=LARGEST_FILE)
    table, findings = validated(CostTable, root, plain(root))
    if table is None:
        raise findings[0].error()
    return table


def table_text(table: CostTable) -> str:
    """Return a table as YAML."""
    data = table.model_dump(mode="json")
    body = yaml.safe_dump(data, sort_keys=False, width=110, default_flow_style=None)
    head = (
        "# What parts of engines take in the cells of one series: fitted to engines that were synthesized one by one.\n"
        "# Written by `bitwright targets probe`; the parts are counted by cost_model.py.\n"
    )
    return head + body


def check_series(table: CostTable, series: str) -> CostTable:
    """Return a table if it is one of the series.

    Raises:
        ProfileError: It is of another one.
    """
    if table.series != series:
        msg = f"a table of {table.series} says nothing about {series}"
        raise ProfileError(msg, where="cost table", fix=f"probe a target of the series {series}")
    return table
