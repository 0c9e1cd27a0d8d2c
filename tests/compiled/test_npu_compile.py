"""Whole models for an array that only YAML describes: compiled, simulated, every layer compared; areas by synthesis."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from plan_models import CNN, build

pytest.importorskip("tvm")

from bitwright.compiler.bundle.bundle import Bundle
from bitwright.compiler.bundle.verify import verify
from bitwright.compiler.errors import InternalError, ModelError, ProfileError, UsageError
from bitwright.compiler.options import Options
from bitwright.compiler.pipeline import compile_model
from bitwright.targets.loader import load_profile
from bitwright.targets.npu.area import module_area, predicted_area, synthesized_area
from bitwright.targets.npu.execution import CYCLES_FILE
from bitwright.targets.npu.generator import GENERATOR
from bitwright.targets.npu.machine import Machine, machine_of
from bitwright.targets.toolchain.circuit_simulator import simulator_missing

pytestmark = pytest.mark.skipif(
    simulator_missing() is not None, reason=f"circuits cannot be simulated here: {simulator_missing()}"
)

# The weight stationary array of test_npu_kernels: its circuit is translated once for both files.
PROFILE = """schema: 1
name: my-array
extends: npu-base
description: 5 x 4, weight stationary.
clock_hz: 1.0e+8
compute:
  - {name: systolic, weight: s8, act: s8, acc: s32, macs_per_cycle: 20}
  - {name: host_fma, weight: f32, act: f32, acc: f32, macs_per_cycle: 1}
memory:
  - {name: buffers, size_bytes: 2000, bytes_per_s: 4.0e+8}
  - {name: dram, size_bytes: 1.0e+6, bytes_per_s: 4.0e+8}
array:
  rows: 5
  columns: 4
  dataflow: weight_stationary
  activation_buffer_bytes: 415
  weight_buffer_bytes: 228
  accumulator_buffer_bytes: 704
provenance:
  clock_hz: {source: "assumed for a test", confidence: estimate}
  compute: {source: "assumed for a test", confidence: estimate}
  memory: {source: "assumed for a test", confidence: estimate}
"""


def samples(count: int = 8) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(1)
    return [{"x": generator.normal(size=(1, 3, 8, 8)).astype(np.float32)} for _ in range(count)]


def options(folder: Path, out: str, **changes: object) -> Options:
    profile, model = folder / "my-array.yaml", folder / "cnn.onnx"
    profile.write_text(PROFILE)
    onnx.save(ir.to_proto(build(CNN)), model)
    given: dict[str, object] = {
        "model": model,
        "target": str(profile),
        "data": samples(),
        "output": folder / out,
    }
    return Options(**(given | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    made = compile_model(options(tmp_path_factory.mktemp("npu"), "out", steps=frozenset({"synth"})))
    assert made is not None
    return made


def test_the_machine_is_the_one_of_the_yaml(bundle: Bundle) -> None:
    assert machine_of(bundle.profile) == Machine(5, 4, True, 8, 83, 57, 44, 1e8)
    top = (bundle.path / "lib" / "npu_top.v").read_text()
    assert ".ROWS(5)" in top and ".WEIGHT_STATIONARY(1)" in top


def test_every_kernel_of_the_simulated_circuit_is_the_references(bundle: Bundle) -> None:
    found = verify(bundle.path)
    assert found.passed
    assert found.executed == "simulated (cxxrtl)"
    assert found.sets == 2 and found.calls > 8


def test_cycles_predicted_are_cycles_simulated(bundle: Bundle) -> None:
    predicted = json.loads((bundle.path / "lib" / CYCLES_FILE).read_text())
    total = sum(layer["cycles"] for layer in predicted.values())
    (measured,) = bundle.simulate(samples(1)[0]).measurements
    assert measured.value == f"{total:,}"
    assert len(predicted) >= 2
    assert all(layer["first_legal_cycles"] >= layer["cycles"] for layer in predicted.values())


def test_the_array_is_synthesized(bundle: Bundle) -> None:
    """Gate equivalents by synthesis against the table: what skews the operands, and lanes that share nothing."""
    shown = {m["label"]: m["value"] for m in bundle.report["generated"]["measurements"]}
    areas = [float(shown[k].split()[0].replace(",", "")) for k in ("Area", "Area by synthesis")]
    assert areas[0] < areas[1] < 1.1 * areas[0]


def test_outputs_are_close_to_the_float_scale_model(bundle: Bundle) -> None:
    """Requantization by a 16-bit multiplier moves single integers by one step at ties only."""
    for sample in samples(4):
        found, golden = bundle.run(sample)["y"], bundle.run(sample, "ort")["y"]
        # The Softmax behind the last layer: one step of its input is some hundredths.
        assert np.abs(found - golden).max() < 0.1


def test_the_report_names_what_the_host_computes(bundle: Bundle) -> None:
    report = bundle.report["generated"]
    assert {"Products on the array", "Schedules"} == {table["title"] for table in report["tables"]}
    assert any("Softmax" in node or "float" in why for node, why in report["not_generated"].items())
    labels = {m["label"] for m in report["measurements"]}
    assert {"Predicted cycles", "First legal schedules", "Area"} <= labels


def test_cycles_that_differ_are_an_error_of_ours(bundle: Bundle, tmp_path: Path) -> None:
    import shutil

    lib = tmp_path / "lib"
    shutil.copytree(bundle.path / "lib", lib)
    predicted = json.loads((lib / CYCLES_FILE).read_text())
    first = next(iter(predicted))
    predicted[first]["cycles"] += 1
    (lib / CYCLES_FILE).write_text(json.dumps(predicted))
    with pytest.raises(InternalError, match="cycles, the search's model says"):
        GENERATOR.execute(lib, samples(1)[0], bundle.profile, check=True)


def test_options_without_meaning_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no step 'pnr'"):
        compile_model(options(tmp_path, "out", steps=frozenset({"pnr"})))


def test_unsigned_activations_are_refused(tmp_path: Path) -> None:
    given = options(tmp_path, "out")
    path = Path(str(given.target))
    path.write_text(
        PROFILE + "qspaces: {a8: {bits: 8, signed: false, symmetric: false, granularity: tensor}}\n"
    )
    with pytest.raises((ProfileError, ModelError), match=r"u8|uint8"):
        compile_model(given)


# A cell library with what yosys needs, areas in round numbers.
LIBERTY = """library (test) {
  cell (BUF)  { area: 2; pin (A) { direction: input; } pin (Y) { direction: output; function: "A"; } }
  cell (INV)  { area: 1; pin (A) { direction: input; } pin (Y) { direction: output; function: "!A"; } }
  cell (NAND) { area: 2; pin (A) { direction: input; } pin (B) { direction: input; }
                pin (Y) { direction: output; function: "!(A B)"; } }
  cell (NOR)  { area: 2; pin (A) { direction: input; } pin (B) { direction: input; }
                pin (Y) { direction: output; function: "!(A + B)"; } }
  cell (DFF)  { area: 10; ff (IQ, IQN) { clocked_on: "C"; next_state: "D"; }
                pin (C) { direction: input; clock: true; } pin (D) { direction: input; }
                pin (Q) { direction: output; function: "IQ"; } }
}
"""


def test_area_by_a_users_cell_library(tmp_path: Path) -> None:
    library = tmp_path / "cells.lib"
    library.write_text(LIBERTY)
    narrow = module_area("npu_weight_stationary_cell", {"WEIGHT_BITS": 2}, library)
    wide = module_area("npu_weight_stationary_cell", {"WEIGHT_BITS": 4}, library)
    # Registers alone: 8 of the activation, those of the weight, 32 of the sum.
    assert narrow > 10 * 42 and wide > narrow + 10 * 2


def test_a_cell_library_that_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="no such cell library"):
        synthesized_area(Machine(2, 2, True, 4, 8, 8, 8, 1e8), tmp_path / "none.lib", timeout_s=60)


def test_a_synthesized_array_is_its_cells_and_what_skews_their_operands() -> None:
    machine, array = Machine(2, 3, True, 2, 8, 8, 8, 1e8), load_profile("npu-8x8").array
    assert array is not None and array.area is not None
    cells = predicted_area(machine, array.area).cells
    found = module_area("npu_weight_stationary_array", {"ROWS": 2, "COLUMNS": 3, "WEIGHT_BITS": 2}, None)
    # Lane i of the activations is held for i cycles, lane i of the sums for 2 - i: 8 + 96 flip-flops of 4 gates.
    assert found == pytest.approx(cells + 4 * (8 + 96), rel=0.1)


def test_the_shipped_table_is_what_synthesis_counts() -> None:
    array = load_profile("npu-8x8").array
    assert array is not None and array.area is not None
    row = next(r for r in array.area.cells if r.weight_bits == 4)
    found = module_area("npu_output_stationary_cell", {"WEIGHT_BITS": 4}, None)
    # Another version of yosys may find somewhat other gates.
    assert found == pytest.approx(row.output_stationary, rel=0.1)
