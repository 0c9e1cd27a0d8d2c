"""From a Q/DQ model whose activations saturate early to a circuit that is as narrow as they are."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from bitwright.compiler.program.extract import extract_program
from bitwright.passes.saturate_activations import SaturateActivations
from bitwright.targets.fpga.assemble import build_network
from bitwright.targets.fpga.carried import carried
from bitwright.targets.loader import load_profile

PROFILE = load_profile("ecp5-85f")
TEXT = """
<ir_version: 10, opset_import: ["": 20]>
g (float[1,3,8,8] x) => (float[1,5,8,8] y) {
  x_q = QuantizeLinear(x, s, zx)
  x_d = DequantizeLinear(x_q, s, zx)
  w = DequantizeLinear<axis=0>(W, sW, zW)
  c = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x_d, w)
  a = Relu(c)
  a_q = QuantizeLinear(a, s, z)
  a_d = DequantizeLinear(a_q, s, z)
  v = DequantizeLinear<axis=0>(V, sV, zV)
  y = Conv<kernel_shape=[1,1]>(a_d, v)
}
"""


def saturated(dtype: type, zero: int, levels: tuple[int, int]) -> ir.Model:
    """Return the model; its second convolution reads so many levels."""
    rng = np.random.default_rng(3)
    model = onnx.parser.parse_model(TEXT)
    arrays = {
        "s": np.float32(0.05),
        "zx": np.int8(4),
        "z": dtype(zero),
        "W": rng.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8),
        "sW": np.full(4, 0.01, np.float32),
        "zW": np.zeros(4, np.int8),
        "V": rng.integers(-2, 2, (5, 4, 1, 1)).astype(np.int8),
        "sV": np.full(5, 0.3, np.float32),
        "zV": np.zeros(5, np.int8),
    }
    for name, value in arrays.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    found = ir.from_proto(model)
    assert SaturateActivations({"a": levels}).run(found).changed == 1
    return found


@pytest.mark.parametrize(
    ("dtype", "zero", "levels", "bits"),
    [
        (np.uint8, 0, (0, 15), 4),
        (np.int8, -128, (-128, -113), 4),
        # The Relu leaves half of these levels.
        (np.int8, 0, (-4, 3), 2),
        (np.uint8, 0, (0, 3), 2),
    ],
)
def test_the_engine_behind_a_clip_has_as_many_bits_as_it_leaves(
    dtype: type, zero: int, levels: tuple[int, int], bits: int
) -> None:
    program = extract_program(saturated(dtype, zero, levels))
    network = build_network(program, PROFILE)
    found = {e.module: e.parameters for e in network.engines}
    first, second = (e.parameters for e in network.engines if e.module == "matrix_vector")
    assert (first["ACT_BITS"], second["ACT_BITS"]) == (8, bits)
    # What the first engine writes lies in these bits, and so do the second one's products.
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    assert low <= first["LOW"] <= first["ZERO"] <= high and low <= first["HIGH"] <= high
    assert second["ACC_BITS"] < first["ACC_BITS"] and "sliding_window" in found
    assert carried(program)[program.steps[1].output].bits == bits


def test_levels_of_the_whole_type_need_eight_bits() -> None:
    program = extract_program(saturated(np.uint8, 0, (0, 254)))
    second = [e for e in build_network(program, PROFILE).engines if e.module == "matrix_vector"][1]
    assert second.parameters["ACT_BITS"] == 8
