"""Synthesis of circuits: predictions against yosys, what is kept between runs, place and route."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from bitwright.compiler.errors import ProfileError, ToolchainError
from bitwright.targets.fpga import probe
from bitwright.targets.fpga.cost_model import cost_table, predict, table_of
from bitwright.targets.fpga.cost_table import read_table
from bitwright.targets.fpga.folding import CODES, device_of
from bitwright.targets.fpga.network import Engine, Folding
from bitwright.targets.fpga.place_route import place_and_route, place_and_route_missing
from bitwright.targets.fpga.probe import matrix_vector, square, windowed
from bitwright.targets.fpga.standalone import TOP, write_standalone
from bitwright.targets.fpga.synthesis import Synthesizer, elaborate
from bitwright.targets.fpga.yosys import yosys_missing
from bitwright.targets.loader import load_profile

MISSING = yosys_missing()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"circuits cannot be synthesized: {MISSING}")
DEVICE = device_of(load_profile("ecp5-25f"))
NO_ROUTER = place_and_route_missing(DEVICE)
# None of these is among the engines that the table was fitted to.
SHAPES = {
    "8 bits in LUTs": matrix_vector(CODES["int8"], Folding(2, 3), 10, 48, seed=7),
    "8 bits in DSP blocks": matrix_vector(CODES["int8"], Folding(2, 6, True), 20, 96, seed=7),
    "4 bits": matrix_vector(CODES["w4a8"], Folding(4, 2), 24, 72, seed=7),
    "4 bits times 4 bits": matrix_vector(CODES["w4a8"], Folding(4, 2), 24, 72, seed=7, input_bits=4),
    "ternary times 4 bits": matrix_vector(CODES["ternary-a8"], Folding(4, 6), 24, 96, seed=7, input_bits=4),
    "ternary": matrix_vector(CODES["ternary-a8"], Folding(4, 6), 24, 96, seed=7),
    "3 bits depthwise": windowed(square(24, 10), 6, CODES["w3a8"])[1],
    "sliding window": windowed(square(24, 20), 6, CODES["w3a8"])[0],
}


@pytest.mark.parametrize("name", SHAPES)
def test_cells_are_predicted_within_15_per_cent(name: str, tmp_path: Path) -> None:
    engine = SHAPES[name]
    files = write_standalone(engine, tmp_path)
    counted = Synthesizer("ecp5", timeout_s=600, cache=tmp_path / "cache").module(tmp_path, files, TOP)
    predicted = predict(engine, cost_table("ecp5"))
    assert predicted.luts == pytest.approx(counted.luts, rel=0.15)
    assert predicted.ffs == pytest.approx(counted.ffs, rel=0.15)
    assert (predicted.dsps, predicted.brams) == (counted.dsps, counted.brams)


def test_cells_of_another_series_are_predicted(tmp_path: Path) -> None:
    """Xilinx 7, with weights in look-up tables: they are as large as the products."""
    engine = SHAPES["4 bits times 4 bits"]
    files = write_standalone(engine, tmp_path)
    counted = Synthesizer("xilinx7", timeout_s=600, cache=tmp_path / "cache").module(tmp_path, files, TOP)
    predicted = predict(engine, cost_table("xilinx7"))
    assert predicted.luts == pytest.approx(counted.luts, rel=0.15)
    assert predicted.ffs == pytest.approx(counted.ffs, rel=0.15)
    assert (predicted.dsps, predicted.brams) == (counted.dsps, counted.brams)


def test_a_table_is_fitted_to_what_was_synthesized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``targets probe`` with few engines: the table is written, read back, and predicts them."""
    engines = [SHAPES["ternary"], SHAPES["ternary times 4 bits"]]
    monkeypatch.setattr(probe, "probed_engines", lambda: engines)
    told: list[tuple[int, int]] = []
    path = tmp_path / "costs.yaml"
    notes = probe.probe_series("ecp5", path, lambda done, total, what: told.append((done, total)))
    table = read_table(path)
    assert told == [(0, 2), (1, 2)] and notes[0].startswith("2 engines synthesized")
    assert (table.series, table.engines) == ("ecp5", 2) and table.error < 0.05
    # What these engines do not have keeps its figures.
    assert table.luts["lane 8"] == cost_table("ecp5").luts["lane 8"]
    profile = tmp_path / "mine.yaml"
    profile.write_text(
        "schema: 1\nname: mine\nextends: ecp5-25f\ndescription: With a table of its own.\n"
        f"fpga: {{costs: {path}}}\nprovenance: {{fpga: {{source: measured, confidence: measured}}}}\n"
    )
    assert table_of(device_of(load_profile(str(profile)))) == table


TWO = """
module two (input clk, input rst, input in_valid, output in_ready, input [7:0] in_data,
            output out_valid, input out_ready, output [7:0] out_data);
  wire valid, ready; wire [7:0] data;
  stream_fifo #(.WIDTH(8), .DEPTH(16)) a (.clk(clk), .rst(rst), .in_valid(in_valid), .in_ready(in_ready),
    .in_data(in_data), .out_valid(valid), .out_ready(ready), .out_data(data));
  stream_fifo #(.WIDTH(8), .DEPTH(DEPTH)) b (.clk(clk), .rst(rst), .in_valid(valid), .in_ready(ready),
    .in_data(data), .out_valid(out_valid), .out_ready(out_ready), .out_data(out_data));
endmodule
"""


def two(folder: Path, depth: int) -> list[str]:
    """Write a design of two FIFOs."""
    engine = Engine(name="x", node="x", module="stream_fifo", parameters={"WIDTH": 8, "DEPTH": 16}, cycles=1)
    files = write_standalone(engine, folder)
    (folder / "two.v").write_text(TWO.replace("DEPTH(DEPTH)", f"DEPTH({depth})"), "utf-8")
    return [*files[:-1], "two.v"]


def test_every_distinct_engine_is_synthesized_once(tmp_path: Path) -> None:
    tool = Synthesizer("ecp5", timeout_s=600, cache=tmp_path / "cache")
    told: list[tuple[int, int]] = []
    equal = tool.circuit(
        tmp_path, two(tmp_path, 16), "two", tmp_path / "n.json", progress=lambda k, n, _: told.append((k, n))
    )
    assert (equal.modules, equal.reused, told) == (1, 0, [(0, 1)])
    assert equal.instances["a"] == equal.instances["b"]
    assert equal.cells.luts == pytest.approx(2 * equal.instances["a"].luts, abs=4)
    other = tool.circuit(tmp_path, two(tmp_path, 600), "two", tmp_path / "n.json")
    assert (other.modules, other.reused) == (2, 1)
    assert other.instances["b"].brams == 1
    assert other.cells.brams == 1


def test_the_content_of_memories_belongs_to_what_is_kept(tmp_path: Path) -> None:
    texts = []
    for seed in (1, 2):
        engine = matrix_vector(CODES["w4a8"], Folding(1, 1), 4, 4, seed=seed)
        with tempfile.TemporaryDirectory() as place:
            design = elaborate(Path(place), write_standalone(engine, Path(place)), TOP, timeout_s=60)
            texts.append(design.closure(design.top))
    assert texts[0] != texts[1]


def test_what_yosys_refuses_is_an_error_of_the_tool(tmp_path: Path) -> None:
    (tmp_path / "broken.v").write_text("module broken(input a; endmodule\n", "utf-8")
    with pytest.raises(ToolchainError, match="elaborating broken"):
        Synthesizer("ecp5", cache=tmp_path).module(tmp_path, ["broken.v"], "broken")


@pytest.mark.skipif(NO_ROUTER is not None, reason=f"nothing can be placed: {NO_ROUTER}")
def test_a_circuit_is_placed_and_gets_a_bitstream(tmp_path: Path) -> None:
    tool = Synthesizer("ecp5", timeout_s=600, cache=tmp_path / "cache")
    found = tool.circuit(tmp_path, two(tmp_path, 600), "two", tmp_path / "netlist.json")
    placed = place_and_route(tmp_path / "netlist.json", DEVICE, tmp_path, clock_hz=1e8, timeout_s=600)
    assert placed.fmax_hz > 1e8
    assert placed.used["block RAMs"] == (found.cells.brams, DEVICE.brams)
    assert placed.used["LUTs"][1] == DEVICE.luts
    assert placed.bitstream.stat().st_size > 100_000


def test_devices_without_open_place_and_route_are_named() -> None:
    with pytest.raises(ProfileError, match="no open place and route for devices of the series xilinx7"):
        place_and_route_missing(device_of(load_profile("zynq-7020")))
