"""Small transformer parts written as ONNX text, with what their linear layers read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from pass_harness import add_weights, parse

from bitwright.compiler.calibrate.moments import collect_moments
from bitwright.compiler.graph.model import node_label
from bitwright.compiler.graph.operands import weight_of
from bitwright.compiler.moments import InputMoments
from bitwright.passes.infer_shapes import InferShapes
from bitwright.passes.name_nodes import NameNodes

HEADER = '<ir_version: 8, opset_import: ["" : 20]>'
SWIGLU = """(float[N, 16] x, float[16, 32] gate, float[16, 32] up, float[32, 8] down) => (float[N, 8] y) {
    g = MatMul (x, gate)
    s = Sigmoid (g)
    a = Mul (g, s)
    u = MatMul (x, up)
    h = Mul (a, u)
    y = MatMul (h, down)
}"""


def model(text: str, **weights: np.ndarray) -> ir.Model:
    """Return a model with named nodes and inferred shapes; ``weights`` become initializers."""
    parsed = add_weights(parse(f"{HEADER} test {text}"), **weights)
    NameNodes().run(parsed)
    InferShapes().run(parsed)
    return parsed


class Samples:
    """Calibration data in memory."""

    def __init__(self, feeds: Sequence[Mapping[str, np.ndarray]]) -> None:
        self._feeds = feeds

    def __len__(self) -> int:
        return len(self._feeds)

    def batches(self, _: int) -> Sequence[Mapping[str, np.ndarray]]:
        """Return the samples one by one."""
        return self._feeds


def moments_of(parsed: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, InputMoments]:
    """Return the moments of all linear layers of the main graph."""
    nodes = [node_label(n) for n in parsed.graph if weight_of(n) is not None]
    return collect_moments(parsed, Samples([feeds]), nodes)


def spiky(
    channels: int, *shape: int, seed: int = 0, outlier: float = 40.0, where: Sequence[int] = (1,)
) -> np.ndarray:
    """Return float32 [*shape, channels] of normal values with a few channels of large ones."""
    values = np.random.default_rng(seed).standard_normal((*shape, channels))
    values[..., list(where)] *= outlier
    return values.astype(np.float32)


def calm(weight: np.ndarray, *rows: int) -> np.ndarray:
    """Return ``weight`` with some rows made small, as trained models have them behind channels with outliers."""
    copy = weight.copy()
    copy[list(rows)] *= np.float32(0.03)
    return copy
