"""Kernels of systolic accelerators: random layers with random schedules, by the cycle model and by the circuit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm")

from npu_layers import build, expected_cycles, random_layers, run

from bitwright.targets.npu.machine import Machine
from bitwright.targets.npu.programs import CIRCUIT_PROGRAM, MODEL_PROGRAM
from bitwright.targets.toolchain.circuit_simulator import simulator_missing

needs_simulator = pytest.mark.skipif(
    simulator_missing() is not None, reason=f"circuits cannot be simulated here: {simulator_missing()}"
)
# Sizes that divide nothing, buffers of odd lengths, weights of 6 bits in one; the wide one has more columns than most
# layers have channels.
MACHINES = {
    "output stationary": Machine(3, 5, False, 6, 75, 61, 45, 1e8),
    "weight stationary": Machine(5, 4, True, 8, 83, 57, 44, 1e8),
    "wide": Machine(4, 16, False, 8, 128, 90, 64, 1e8),
}
SEEDS = {"output stationary": 11, "weight stationary": 12, "wide": 13}
LAYERS = 8


@pytest.mark.parametrize("name", MACHINES)
def test_random_layers_equal_the_reference_and_the_cycle_model(name: str, tmp_path: Path) -> None:
    machine, layers = MACHINES[name], random_layers(SEEDS[name], LAYERS, MACHINES[name])
    tilings = layers.tilings(machine)
    assert len({repr(t) for t in tilings.values()}) > LAYERS // 2
    build(layers, tilings, machine, tmp_path, circuit=False)
    found, checks = run(layers, tmp_path, MODEL_PROGRAM)
    for check in checks:
        where = f"{check.step} with {tilings.get(check.step)}, seed {SEEDS[name]}"
        np.testing.assert_array_equal(check.actual, check.expected, err_msg=where)
    assert found.cycles == expected_cycles(layers, tilings, machine)
    spread = [np.unique(output).size for output in found.outputs.values()]
    assert np.median(spread) > 20, "the outputs are not constants"


@needs_simulator
@pytest.mark.parametrize("name", ["output stationary", "weight stationary"])
def test_the_circuit_computes_the_same_in_the_same_cycles(name: str, tmp_path: Path) -> None:
    machine, layers = MACHINES[name], random_layers(SEEDS[name] + 50, LAYERS, MACHINES[name])
    tilings = layers.tilings(machine)
    build(layers, tilings, machine, tmp_path, circuit=True)
    circuit, checks = run(layers, tmp_path, CIRCUIT_PROGRAM)
    for check in checks:
        where = f"{check.step} with {tilings.get(check.step)}, seed {SEEDS[name] + 50}"
        np.testing.assert_array_equal(check.actual, check.expected, err_msg=where)
    assert circuit.cycles == expected_cycles(layers, tilings, machine)
    model, _ = run(layers, tmp_path, MODEL_PROGRAM)
    assert circuit.cycles == model.cycles


def test_kernels_are_plain_c(tmp_path: Path) -> None:
    machine, layers = MACHINES["wide"], random_layers(1, 2, MACHINES["wide"])
    build(layers, layers.tilings(machine), machine, tmp_path, circuit=False)
    text = (tmp_path / "npu_kernels.c").read_text()
    assert "npu_tile(" in text and "npu_load_activations(" in text and "npu_finish();" in text
    assert "tvm/" not in text and "TVM_" not in text


def test_a_wrong_kernel_is_seen(tmp_path: Path) -> None:
    machine, layers = MACHINES["output stationary"], random_layers(3, 1, MACHINES["output stationary"])
    tilings = layers.tilings(machine)
    build(layers, tilings, machine, tmp_path, circuit=False)
    source = tmp_path / "npu_model.c"
    text = source.read_text()
    source.write_text(text.replace("+ c->zero_point;", "+ c->zero_point + 1;"))
    assert source.read_text() != text
    from bitwright.targets.npu.programs import build_programs

    build_programs(machine, tmp_path, circuit=False)
    _, checks = run(layers, tmp_path, MODEL_PROGRAM)
    assert any(not np.array_equal(c.actual, c.expected) for c in checks)
