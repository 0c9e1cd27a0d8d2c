"""Cost tables of circuits: what is counted, where memories go, and that tables cover what engines consist of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bitwright.compiler.errors import ProfileError
from bitwright.targets.fpga.cells import Cells, Series, count_cells
from bitwright.targets.fpga.cost_model import (
    MemoryShape,
    cells_of,
    cost_table,
    mapped,
    parts_of,
    predict,
    table_of,
)
from bitwright.targets.fpga.cost_table import table_text
from bitwright.targets.fpga.folding import CODES
from bitwright.targets.fpga.network import Engine, Folding
from bitwright.targets.fpga.probe import matrix_vector, probed_engines
from bitwright.targets.loader import load_profile
from bitwright.targets.schema import SHORT_FORMATS

SERIES: tuple[Series, ...] = ("ecp5", "xilinx7")


def test_cells_are_counted_in_what_devices_are_sold_by() -> None:
    counts = {"LUT4": 10, "CCU2C": 3, "TRELLIS_DPR16X4": 1, "TRELLIS_FF": 7, "MULT18X18D": 2, "DP16KD": 4}
    assert count_cells(counts, "ecp5") == Cells(22, 7, 2, 4)
    counts = {
        "LUT2": 1,
        "LUT6": 2,
        "CARRY4": 9,
        "FDRE": 3,
        "FDSE": 1,
        "DSP48E1": 5,
        "RAMB36E1": 1,
        "RAMB18E1": 1,
    }
    assert count_cells(counts, "xilinx7") == Cells(3, 4, 5, 3)


# What yosys 0.70 made of single memories.
@pytest.mark.parametrize(
    ("kind", "width", "depth", "blocks"),
    [
        *[
            ("rom", 8, 256, 0),
            ("rom", 8, 512, 1),
            ("rom", 32, 64, 0),
            ("rom", 32, 128, 1),
            ("rom", 46, 512, 2),
        ],
        *[
            ("rom", 46, 1024, 3),
            ("rom", 64, 1024, 4),
            ("rom", 36, 64, 1),
            ("rom", 40, 64, 0),
            ("rom", 48, 2560, 7),
        ],
        *[("rom", 64, 2560, 9), ("rom", 128, 2560, 18), ("rom", 24, 100, 1)],
        *[("ram", 8, 128, 0), ("ram", 8, 256, 1), ("ram", 32, 32, 0), ("ram", 32, 64, 1), ("ram", 46, 64, 0)],
        *[
            ("ram", 46, 128, 2),
            ("ram", 64, 32, 0),
            ("ram", 64, 64, 2),
            ("ram", 64, 1024, 4),
            ("ram", 512, 9, 0),
        ],
    ],
)
def test_memories_of_ecp5_go_where_yosys_puts_them(kind: str, width: int, depth: int, blocks: int) -> None:
    shape = MemoryShape(width, depth, kind)  # type: ignore[arg-type]
    found = mapped(shape, cost_table("ecp5").memories)
    assert found.brams == blocks
    assert found.luts > 0 or kind == "rom"


@pytest.mark.parametrize(
    ("kind", "width", "depth", "blocks"),
    [
        *[
            ("rom", 8, 1024, 0),
            ("rom", 32, 256, 0),
            ("rom", 32, 512, 1),
            ("rom", 64, 512, 2),
            ("rom", 64, 1024, 4),
        ],
        *[
            ("ram", 8, 256, 0),
            ("ram", 8, 512, 1),
            ("ram", 32, 64, 0),
            ("ram", 32, 128, 1),
            ("ram", 64, 128, 2),
        ],
    ],
)
def test_memories_of_xilinx_go_where_yosys_puts_them(kind: str, width: int, depth: int, blocks: int) -> None:
    shape = MemoryShape(width, depth, kind)  # type: ignore[arg-type]
    assert mapped(shape, cost_table("xilinx7").memories).brams == blocks


@pytest.mark.parametrize("series", SERIES)
def test_narrower_weights_take_fewer_luts(series: Series) -> None:
    """Memories apart: narrower ones may leave their block RAM for look-up tables."""
    order = ("int8", "w6a8", "w5a8", "w4a8", "w3a8", "ternary-a8")
    engines = [matrix_vector(CODES[f], Folding(4, 4), 32, 144) for f in order]
    parts = [replace(parts_of(e.module, e.parameters), memories=()) for e in engines]
    taken = [cells_of(p, cost_table(series)).luts for p in parts]
    assert taken == sorted(taken, reverse=True)
    assert taken[order.index("w4a8")] < 0.7 * taken[0]


@pytest.mark.parametrize("series", SERIES)
def test_products_in_dsp_blocks_take_blocks_instead_of_luts(series: Series) -> None:
    luts, blocks = (
        predict(matrix_vector(CODES["int8"], Folding(4, 4, dsp), 32, 144), cost_table(series))
        for dsp in (False, True)
    )
    assert blocks.dsps - luts.dsps == 16
    assert blocks.luts < luts.luts / 2


@pytest.mark.parametrize("series", SERIES)
def test_tables_say_something_about_every_module(series: Series) -> None:
    table = cost_table(series)
    assert table.engines >= 20
    assert 0 < table.error < 0.15
    for engine in probed_engines():
        parts = parts_of(engine.module, engine.parameters)
        assert predict(engine, table).luts > 0, engine.module
        assert any(name in table.luts or name in table.ffs for name in parts.amounts), engine.module


def test_every_format_has_a_code() -> None:
    assert set(CODES) == {"int8", *SHORT_FORMATS}


def test_an_unknown_module_is_refused() -> None:
    engine = Engine(name="x", node="x", module="stream_unknown", parameters={}, cycles=1)
    with pytest.raises(ProfileError, match="no costs are known of the module 'stream_unknown'"):
        predict(engine, cost_table("ecp5"))


def test_a_profile_may_name_a_table_of_its_own(tmp_path: Path) -> None:
    own = cost_table("ecp5").model_copy(update={"luts": {"lane 8": 1000.0}})
    path = tmp_path / "costs.yaml"
    path.write_text(table_text(own), "utf-8")
    device = load_profile("ecp5-85f").fpga
    assert device is not None
    assert table_of(device.model_copy(update={"costs": str(path)})) == own
    other = device.model_copy(update={"costs": str(path), "series": "xilinx7"})
    with pytest.raises(ProfileError, match="a table of ecp5 says nothing about xilinx7"):
        table_of(other)
