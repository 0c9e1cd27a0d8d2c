"""Schedules of systolic accelerators: what is legal, what it costs, that the search is exact; areas and profiles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.compiler.errors import InfeasibleBudgetError, ModelError, PerformanceGateError, ProfileError
from bitwright.compiler.interpret.fixed_point import requantize
from bitwright.compiler.lower.templates.geometry import geometry_of
from bitwright.compiler.program.ops import Program, QConv, QGemm, QuantParams, Tensor
from bitwright.targets.loader import load_profile
from bitwright.targets.npu.area import predicted_area
from bitwright.targets.npu.cycle_model import (
    LOAD,
    STORE,
    TILE,
    Command,
    command_bound,
    commands,
    count_cycles,
    halves,
)
from bitwright.targets.npu.machine import Machine, machine_of, size_header, top_module
from bitwright.targets.npu.problem import (
    Problem,
    full_bias,
    multipliers,
    packed_parameters,
    packed_weights,
    problem_of,
)
from bitwright.targets.npu.reference import reference_dot
from bitwright.targets.npu.search import cycles_of, tune
from bitwright.targets.npu.tiling import Tiling, fills, grid_of, is_legal, legal_tilings
from bitwright.targets.sections.systolic import CellArea, SystolicArea

SMALL = Machine(4, 3, False, 8, 48, 40, 32, 1e8)
STATIONARY = Machine(4, 3, True, 8, 48, 40, 32, 1e8)
MACHINES = pytest.mark.parametrize("machine", [SMALL, STATIONARY], ids=lambda m: m.dataflow)


def product(pixels: int, depth: int, outputs: int, groups: int = 1) -> Problem:
    return Problem(groups, 1, pixels, depth, outputs, groups * pixels * depth * outputs)


PROBLEMS = st.builds(product, st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(1, 2))


# ------------------------------------------------------------------------------------------------ cycles


def test_units_overlap_unless_they_need_the_same_half() -> None:
    load, tile = Command(LOAD, 1, 11), Command(TILE, 1, 20)
    other = Command(LOAD, 2, 11)
    assert count_cycles([load]) == 11
    # The tile waits for its operands, the next load only for its unit: 11 + 20, beside it 11 + 11.
    assert count_cycles([load, tile, other]) == 31
    # The same half again: the load waits until the tile has read it.
    assert count_cycles([load, tile, load]) == 11 + 20 + 11


def test_one_command_a_cycle_in_order() -> None:
    # A store that waits holds up the load behind it, though the load's unit is idle.
    tile, store, load = Command(TILE, 16, 50), Command(STORE, 16, 9), Command(LOAD, 1, 5)
    assert count_cycles([tile, store, load]) == 50 + 9
    assert count_cycles([tile, load, store]) == 50 + 9
    assert count_cycles([load, Command(TILE, 4, 3), Command(STORE, 64, 4)]) == 2 + 4


def test_halves_of_odd_buffers() -> None:
    assert [halves(a, 2, 5) for a in range(4)] == [1, 3, 2, 2]
    assert halves(0, 5, 5) == 3


@MACHINES
@settings(max_examples=30, deadline=None)
@given(problem=PROBLEMS)
def test_the_search_finds_the_best_legal_schedule(machine: Machine, problem: Problem) -> None:
    grid = grid_of(problem, machine)
    legal = list(legal_tilings(grid, machine))
    if not legal:
        with pytest.raises(InfeasibleBudgetError):
            tune(grid, machine)
        return
    counted = {tiling: cycles_of(grid, tiling, machine) for tiling in legal}
    found = tune(grid, machine)
    assert found.cycles == min(counted.values()) == counted[found.best]
    assert found.first_cycles == counted[legal[0]]
    assert all(command_bound(grid, tiling, machine) <= cycles for tiling, cycles in counted.items())


@MACHINES
@settings(max_examples=30, deadline=None)
@given(problem=PROBLEMS)
def test_every_legal_schedule_computes_every_product_once(machine: Machine, problem: Problem) -> None:
    grid = grid_of(problem, machine)
    for tiling in list(legal_tilings(grid, machine))[::7]:
        needs = fills(grid, tiling)
        assert needs.activations <= machine.activation_words // (2 if tiling.double_activations else 1)
        assert needs.weights <= machine.weight_words // (2 if tiling.double_weights else 1)
        assert needs.sums <= machine.accumulator_words // (2 if tiling.double_sums else 1)
        tiles = sum(c.unit == TILE for c in commands(grid, tiling, machine))
        words = tiling.pixels if machine.weight_stationary else tiling.depth
        lanes = machine.rows
        steps = grid.groups * grid.blocks * grid.depth * problem.pixels
        # Never fewer than the products, and more by whole units and the stated waste of pixels only.
        assert tiles * words * lanes >= steps
        assert tiles * words * lanes <= steps * 2 + grid.groups * grid.blocks * grid.depth * 2 * lanes


def test_a_block_that_does_not_fit_is_illegal() -> None:
    grid = grid_of(product(16, 24, 3), SMALL)
    assert is_legal(grid, Tiling(1, 1, 24), SMALL)
    assert not is_legal(grid, Tiling(1, 1, 24, activations="group"), SMALL)  # 4 units of 24 words; 48 fit
    assert is_legal(grid, Tiling(2, 1, 24), SMALL)
    assert not is_legal(grid, Tiling(2, 1, 24, double_activations=True), SMALL)


def test_the_first_legal_schedule_is_the_arrays_own_size() -> None:
    first = next(legal_tilings(grid_of(product(16, 24, 6), SMALL), SMALL))
    assert first == Tiling(1, 1, 4)
    first = next(legal_tilings(grid_of(product(16, 24, 6), STATIONARY), STATIONARY))
    assert first == Tiling(4, 1, 1)


@pytest.mark.parametrize("name", ["npu-8x8", "npu-16x16"])
def test_a_large_product_is_at_least_1_8_times_faster_tuned(name: str) -> None:
    machine = machine_of(load_profile(name))
    found = tune(grid_of(product(256, 256, 256), machine), machine)
    assert found.first_cycles >= 1.8 * found.cycles
    assert 256**3 / (found.cycles * machine.macs_per_cycle) > 0.6


# ------------------------------------------------------------------------------------------------ constants


def layer(channels: int, outputs: int, group: int = 1) -> tuple[QConv, Program]:
    random = np.random.default_rng(0)
    tensors = {
        "x": Tensor("x", (1, channels, 6, 5), "int8", QuantParams("int8", 0.05, 7)),
        "y": Tensor("y", (1, outputs, 6, 5), "int8", QuantParams("int8", 0.4, -3)),
    }
    step = QConv(
        name="conv",
        inputs=("x",),
        outputs=("y",),
        weight=random.integers(-127, 128, (outputs, channels // group, 3, 3)).astype(np.int8),
        weight_scale=random.uniform(0.001, 0.02, outputs).astype(np.float32),
        bias=random.integers(-900, 900, outputs).astype(np.int32),
        lower=-128,
        upper=127,
        pads=(1, 1, 1, 1),
        group=group,
    )
    return step, Program(("x",), ("y",), (step,), tensors)


@MACHINES
@pytest.mark.parametrize("group", [1, 2, 6])
def test_packed_constants_compute_the_layer(machine: Machine, group: int) -> None:
    """Patches by numpy times packed weights, requantized with packed parameters, are the reference's outputs."""
    step, program = layer(6, 12, group)
    geometry = geometry_of(step, program)
    problem = problem_of(geometry, machine)
    weights = packed_weights(step, geometry, problem, machine).astype(np.int64)
    bias, multiplier, shift = packed_parameters(step, program, problem, machine).transpose(2, 0, 1, 3)
    x = np.random.default_rng(1).integers(-128, 128, (1, 6, 6, 5)).astype(np.int8)
    padded = np.pad(x.astype(np.int64), ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=7)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))[0]
    width = problem.merged * geometry.group_channels
    found = np.zeros((30, problem.groups * problem.outputs), np.int64)
    for g in range(problem.groups):
        own = windows[g * width : (g + 1) * width]
        if len(own) < width:
            own = np.concatenate([own, np.full((width - len(own), *own.shape[1:]), 7)])
        patches = own.transpose(1, 2, 3, 4, 0).reshape(30, -1)
        matrix = weights[g].transpose(1, 0, 2).reshape(weights.shape[2], -1)[: problem.depth]
        sums = patches @ matrix + bias[g].reshape(-1)
        moved = (sums * multiplier[g].reshape(-1) + (1 << (shift[g].reshape(-1) - 1))) >> shift[g].reshape(-1)
        columns = slice(g * problem.outputs, (g + 1) * problem.outputs)
        found[:, columns] = np.clip(moved - 3, -128, 127)[:, : problem.outputs]
    expected = reference_dot(step, program, x)[0].reshape(12, 30).T
    np.testing.assert_array_equal(found[:, :12], expected)


def test_the_reference_is_half_a_step_from_real_arithmetic() -> None:
    step, program = layer(6, 12)
    x = np.random.default_rng(1).integers(-128, 128, (1, 6, 6, 5)).astype(np.int8)
    centred = np.pad(x.astype(np.float64) - 7, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(centred, (3, 3), axis=(2, 3))[0]
    sums = np.einsum("chwij,ocij->ohw", windows, step.weight.astype(np.float64)) + step.bias[:, None, None]
    real = sums * (0.05 * step.weight_scale.astype(np.float64) / 0.4)[:, None, None] - 3
    found = reference_dot(step, program, x)[0]
    inside = (real > -127.5) & (real < 126.5)
    # Half a step of rounding, and 2^-16 of the value by the multiplier.
    assert np.abs(found - real)[inside].max() <= 0.5 + 2**-16 * 131


def test_requantized_sums_that_vanish_need_no_longer_shift() -> None:
    step, program = layer(6, 12)
    tiny = QConv(**{**step.__dict__, "weight_scale": np.full(12, 1e-14, np.float32)})
    by = multipliers(tiny, program)
    problem = problem_of(geometry_of(tiny, program), SMALL)
    shifts = packed_parameters(tiny, program, problem, SMALL)[:, :, 2]
    assert by.shift.max() > 48 and shifts.max() == 48
    sums = np.array([-(2**31) + 1, 2**31 - 1])
    assert not requantize(sums[:, None], by, "half_up").any()


def test_float_outputs_wide_weights_and_wide_sums_are_refused() -> None:
    step, program = layer(6, 12)
    tensors = {**program.tensors, "y": Tensor("y", (1, 12, 6, 5), "float32")}
    with pytest.raises(PerformanceGateError, match="writes 8-bit integers"):
        multipliers(step, Program(("x",), ("y",), (step,), tensors))
    geometry = geometry_of(step, program)
    narrow = Machine(4, 3, False, 4, 48, 40, 32, 1e8)
    with pytest.raises(ModelError, match="4 bits"):
        packed_weights(step, geometry, problem_of(geometry, narrow), narrow)
    heavy = QConv(**{**step.__dict__, "bias": np.full(12, 2**31 - 1, np.int32)})
    with pytest.raises(ModelError, match="32 bits"):
        full_bias(heavy, program)


def test_depthwise_layers_fill_the_columns() -> None:
    step, program = layer(6, 6, group=6)
    problem = problem_of(geometry_of(step, program), SMALL)
    assert (problem.groups, problem.merged, problem.depth, problem.outputs) == (2, 3, 27, 3)


def test_a_gemm_is_one_product() -> None:
    tensors = {
        "x": Tensor("x", (2, 3, 10), "int8", QuantParams("int8", 0.1, 0)),
        "y": Tensor("y", (2, 3, 7), "int8", QuantParams("int8", 0.1, 0)),
    }
    weight = np.ones((10, 7), np.int8)
    step = QGemm(name="g", inputs=("x",), outputs=("y",), weight=weight, weight_scale=np.ones(7, np.float32))
    problem = problem_of(geometry_of(step, Program(("x",), ("y",), (step,), tensors)), SMALL)
    assert (problem.groups, problem.pixels, problem.depth, problem.outputs) == (1, 6, 10, 7)


# ------------------------------------------------------------------------------------------------ profiles and areas

THIRD = """schema: 1
name: my-array
extends: npu-base
description: 5 x 12, weight stationary.
clock_hz: 1.5e+8
compute:
  - {name: systolic, weight: s8, act: s8, acc: s32, macs_per_cycle: 60}
  - {name: host_fma, weight: f32, act: f32, acc: f32, macs_per_cycle: 1}
memory:
  - {name: buffers, size_bytes: 20000, bytes_per_s: 1.5e+9}
  - {name: dram, size_bytes: 1.0e+6, bytes_per_s: 1.5e+9}
array:
  rows: 5
  columns: 12
  dataflow: weight_stationary
  activation_buffer_bytes: 5000
  weight_buffer_bytes: 6000
  accumulator_buffer_bytes: 9600
provenance:
  clock_hz: {source: "assumed for a test", confidence: estimate}
  compute: {source: "assumed for a test", confidence: estimate}
  memory: {source: "assumed for a test", confidence: estimate}
"""


def written(folder: Path, *changes: tuple[str, str]) -> Path:
    text = THIRD
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = folder / "my-array.yaml"
    path.write_text(text)
    return path


def test_an_array_is_described_by_yaml_alone(tmp_path: Path) -> None:
    machine = machine_of(load_profile(written(tmp_path)))
    assert machine == Machine(5, 12, True, 8, 1000, 500, 200, 1.5e8)
    assert "NPU_COLUMNS = 12," in size_header(machine)
    assert ".ACCUMULATOR_WORDS(200)" in top_module(machine)
    assert "[95:0] in_data" in top_module(machine)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("macs_per_cycle: 60", "macs_per_cycle: 64", "makes 60 multiply-accumulates"),
        ("accumulator_buffer_bytes: 9600", "accumulator_buffer_bytes: 300", "needs 10 at least"),
        ("weight_buffer_bytes: 6000", "weight_buffer_bytes: 600000", "can address 32768"),
        (
            "clock_hz: 1.5e+8\n",
            "clock_hz: 1.5e+8\nnumerics: {requantize: {multiplier_bits: 20}}\n",
            "16 bits",
        ),
        ("  rows: 5\n", "  rows: 5\n  weight_bits: 4\n", "int8 have 8 bits, those of the array 4"),
    ],
)
def test_contradictions_of_a_profile_are_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=message):
        machine_of(load_profile(written(tmp_path, (old, new))))


def test_areas_follow_the_table_and_are_interpolated() -> None:
    cells = tuple(
        CellArea(weight_bits=b, output_stationary=100.0 * b, weight_stationary=200.0 * b) for b in (4, 8)
    )
    table = SystolicArea(source="made up for a test", cells=cells, requantize_lane=10.0)
    assert predicted_area(SMALL, table).total == 12 * 800 + 3 * 10
    six = Machine(4, 3, True, 6, 48, 40, 32, 1e8)
    assert predicted_area(six, table).cells == 12 * 1200
    two = Machine(4, 3, True, 2, 48, 40, 32, 1e8)
    with pytest.raises(ProfileError, match="weights of 2 bits"):
        predicted_area(two, table)
