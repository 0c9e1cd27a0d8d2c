"""What every pass test asks: how often it fired, that the result is valid, equal in numbers and settled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from bitwright.passes.contract import Pass, PassResult

EXACT = 0.0
FLOAT32 = 1e-5  # a few float32 roundings of values that the rewrite computes in another order


def parse(text: str) -> ir.Model:
    """Return the model written as ONNX text."""
    return ir.from_proto(onnx.parser.parse_model(text))


def run_onnxruntime(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run with all of ONNX Runtime's own graph optimizations off, so that only ours are judged."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    data = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(None, dict(feeds)), strict=True))


def assert_equal_outputs(
    before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray], bound: float
) -> None:
    """Compare all outputs; ``bound`` is the largest difference relative to the output's largest magnitude."""
    assert list(before) == list(after)
    for name, old in before.items():
        new = after[name]
        assert (old.dtype, old.shape) == (new.dtype, new.shape), name
        if bound == EXACT or old.dtype.kind not in "f":
            np.testing.assert_array_equal(old, new, err_msg=name)
            continue
        scale = float(np.abs(old.astype(np.float64)).max(initial=0.0)) or 1.0
        worst = float(np.abs(old.astype(np.float64) - new.astype(np.float64)).max(initial=0.0)) / scale
        assert worst <= bound, (
            f"output '{name}' differs by {worst:.3g} of its largest value, allowed {bound:.3g}"
        )


def check_pass(
    step: Pass,
    model: ir.Model | str,
    feeds: Mapping[str, np.ndarray],
    *,
    fires: int,
    ops: Mapping[str, int] | None = None,
    bound: float = EXACT,
    golden: Path | None = None,
) -> PassResult:
    """Run ``step`` on ``model`` and check the whole contract of a pass.

    Args:
        step: The pass.
        model: ONNX text or a model (edited in place).
        feeds: Inputs to compare the outputs on.
        fires: How many rewrites must fire.
        ops: Operator counts of the main graph afterwards.
        bound: Largest output difference, see :func:`assert_equal_outputs`; the default demands equal bits.
        golden: File with the expected ONNX text.
    """
    model = parse(model) if isinstance(model, str) else model
    before = run_onnxruntime(model, feeds)
    result = step.run(model)
    assert result.model is model
    assert result.changed == fires, f"fired {result.changed} times; notes: {result.notes}"
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert_equal_outputs(before, run_onnxruntime(model, feeds), bound)
    if ops is not None:
        assert count_ops(model) == dict(ops)
    text = onnx.printer.to_text(ir.to_proto(model))
    if golden is not None:
        assert text == golden.read_text()
    assert step.run(model).changed == 0, "the pass does not settle"
    assert onnx.printer.to_text(ir.to_proto(model)) == text
    return result


def count_ops(model: ir.Model) -> dict[str, int]:
    """Return how often each operator is in the main graph."""
    return dict(Counter(node.op_type for node in model.graph))


def random(*shape: int, seed: int = 0) -> np.ndarray:
    """Return reproducible float32 values."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def add_weights(model: ir.Model, **arrays: np.ndarray) -> ir.Model:
    """Give a parsed model initializers too large to write as text; inputs of those names disappear."""
    graph = model.graph
    inputs = {v.name: v for v in graph.inputs}
    for name, array in arrays.items():
        inputs[name].const_value = ir.Tensor(array, name=name)
        graph.register_initializer(inputs[name])
    kept = [v for v in graph.inputs if v.name not in arrays]
    graph.inputs.clear()
    graph.inputs.extend(kept)
    return model
