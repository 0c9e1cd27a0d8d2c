"""Each layer's own error: what it adds when everything before it is exact.

The error that is seen at a layer of a quantized model is mostly inherited. To tell the two apart the quantized model
is cut at every layer's output: each piece is fed the float model's values and compared with them. One session runs
all pieces, one run a sample.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import FreshNames
from bitwright.compiler.ort.layer_error import NoiseMeter, with_outputs
from bitwright.compiler.ort.replaced_layer import quantized_copies
from bitwright.compiler.ort.session import SessionConfig, open_session, run


def own_errors(
    float_model: ir.Model,
    quantized: ir.Model,
    tensors: Sequence[str],
    feeds: Iterable[Mapping[str, np.ndarray]],
    *,
    unread: Collection[str] = (),
    config: SessionConfig | None = None,
) -> dict[str, float]:
    """Return the SQNR in dB of each named tensor if only the layers since the named tensors before it are quantized.

    A tensor's rounding belongs to the layer that reads the integers. Where no layer does, it belongs to the one that
    writes the tensor, whose kernel gives nothing but integers.

    Args:
        float_model: The float model.
        quantized: The model made from it; a tensor that it does not have under its name is left out.
        tensors: Names of float tensors that nodes of ``float_model`` write: the outputs of its layers.
        feeds: A few samples.
        unread: Those of the tensors that are quantized and that no layer reads as integers.
        config: Session options that the quantized model needs.
    """
    pieces, made = cut_at(quantized, _in_both(float_model, quantized, tensors), unread)
    if not made:
        return {}
    config = config or SessionConfig()
    reference = open_session(with_outputs(float_model, list(made)), config)
    actual = open_session(pieces, config)
    meter = NoiseMeter()
    for sample in feeds:
        exact = run(reference, sample)
        found = run(actual, {**sample, **exact})
        for name, output in made.items():
            meter.add(name, exact[name], found[output])
    return meter.sqnr_db()


def _in_both(float_model: ir.Model, quantized: ir.Model, tensors: Sequence[str]) -> list[str]:
    floats, others = (
        {v.name for n in m.graph for v in n.outputs if v.dtype in (None, ir.DataType.FLOAT)}
        for m in (float_model, quantized)
    )
    return [t for t in dict.fromkeys(tensors) if t in floats and t in others]


def cut_at(
    model: ir.Model, tensors: Sequence[str], unread: Collection[str] = ()
) -> tuple[ir.Model, dict[str, str]]:
    """Return a copy in which every named tensor is an input, and the names under which its values are outputs.

    Readers of a named tensor read the input; the node that writes it writes an output of a new name. Outputs of the
    graph that are not named are left out.

    Args:
        model: The model; weights are shared with the copy, not copied.
        tensors: Names of tensors that nodes of the main graph write.
        unread: Those of them that are cut behind their quantizers instead of before.
    """
    copy = model.clone()
    fresh = FreshNames(copy)
    values = {v.name: v for n in copy.graph for v in n.outputs}
    made: dict[str, str] = {}
    copy.graph.outputs.clear()
    for name in tensors:
        written = values[name]
        fed = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=None)
        rounded = [d for _, d in quantized_copies(copy, name)] if name in unread else []
        if len(rounded) == 1:
            # Readers of the quantized copy read the exact values; the copy is what the layer makes.
            ir.convenience.replace_all_uses_with(rounded[0], fed)
            written = rounded[0]
            values[name].name = fresh(f"{name}_unrounded")
        else:
            ir.convenience.replace_all_uses_with(written, fed)
        written.name = made[name] = fresh(f"{name}_made")
        copy.graph.inputs.append(fed)
        copy.graph.outputs.append(written)
    return copy, made
