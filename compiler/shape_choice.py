"""Which fixed shape an artifact is compiled for: what the user names, else what the data shows most often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from bitwright.compiler.errors import DataError, ModelError, UsageError, nearest
from bitwright.compiler.graph.model import constant_array, is_op, node_label, static_shape
from bitwright.passes.fix_dims import dynamic_dims
from bitwright.passes.normalize import specialize

# Enough to see the usual shape without reading a whole data set.
EXAMINED_SAMPLES = 256


def dims_of_sample(model: ir.Model, sample: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Return the size of every dynamic input dimension (its name, or ``input:axis``) in one sample."""
    sizes: dict[str, int] = {}
    for value in model.graph.inputs:
        array = sample[value.name or ""]
        for axis, dim in enumerate(value.shape or ()):
            label = _label(value, axis, dim)
            if label is not None:
                sizes[label] = array.shape[axis]
    return sizes


def is_batch(model: ir.Model, dim: str) -> bool:
    """Tell whether a dimension is the outermost of every input that has it: its elements lie one behind the other."""
    for value in model.graph.inputs:
        axes = [k for k, d in enumerate(value.shape or ()) if _label(value, k, d) == dim]
        if axes not in ([], [0]):
            return False
    return True


def _label(value: ir.Value, axis: int, dim: object) -> str | None:
    """Return the name of an input's dynamic dimension."""
    if not isinstance(dim, ir.SymbolicDim):
        return None
    return dim.value if dim.value is not None else f"{value.name}:{axis}"


def choose_dims(
    model: ir.Model,
    samples: Iterable[Mapping[str, np.ndarray]],
    wanted: Mapping[str, int],
    *,
    buckets: Mapping[str, Sequence[int]] = MappingProxyType({}),
    loop: str | None = None,
    dynamic: str | None = None,
) -> dict[str, int]:
    """Return a size for every dynamic dimension.

    Args:
        model: The model, for its inputs.
        samples: Single samples.
        wanted: Sizes the user fixed; the others come from the samples that agree with them, the most frequent
            combination first, the largest among equals.
        buckets: Dimension -> ascending sizes; a sample counts for the smallest that holds it.
        loop: Dimension that is served one element at a time: its size is 1.
        dynamic: Dimension of any size; planned for its smallest bucket. Without one a batch is planned for 1, a length
            for what the data shows.

    Raises:
        UsageError: An option names no dynamic dimension.
        DataError: Every sample is larger than the largest bucket.
    """
    known = dynamic_dims(model)
    named = (
        [(n, "--dim") for n in wanted]
        + [(n, "--bucket") for n in buckets]
        + [(loop, "--loop")] * bool(loop)
        + [(dynamic, "--dynamic")] * bool(dynamic)
    )
    for name, option in named:
        if name not in known:
            fix = (
                nearest(name or "", known)
                if known
                else f"the model has no dynamic dimensions: leave {option} out"
            )
            msg = f"the model has no dynamic dimension '{name}'"
            raise UsageError(msg, where=option, fix=fix)
    counts: Counter[tuple[int, ...]] = Counter()
    for sample in islice(samples, EXAMINED_SAMPLES):
        sizes = dims_of_sample(model, sample) | dict(wanted) | ({loop: 1} if loop else {})
        if dynamic and (dynamic in buckets or is_batch(model, dynamic)):
            sizes[dynamic] = min(buckets.get(dynamic, (1,)))
        held = {n: next((b for b in sorted(buckets[n]) if b >= sizes[n]), None) for n in buckets}
        if None not in held.values():
            counts[tuple((sizes | held)[name] or 0 for name in known)] += 1
    if not counts:
        msg = "every sample is larger than the largest bucket"
        raise DataError(msg, where="--bucket", fix="name a larger bucket")
    best = max(counts, key=lambda sizes: (counts[sizes], sizes))
    # A cache is empty in a sample that is the beginning of a text; nothing is planned for a tensor without elements.
    return {name: max(size, 1) for name, size in zip(known, best, strict=True)}


def samples_of_shape(
    model: ir.Model, samples: Iterable[Mapping[str, np.ndarray]], dims: Mapping[str, int], count: int
) -> list[dict[str, np.ndarray]]:
    """Return the last ``count`` samples that have these sizes (the last are the least likely to calibrate).

    Raises:
        DataError: No sample has them.
    """
    found = [dict(s) for s in samples if dims_of_sample(model, s) == dict(dims)]
    if not found:
        shape = ", ".join(f"{name}={size}" for name, size in dims.items())
        msg = f"no sample has the shape {shape}"
        raise DataError(
            msg,
            where="--dim",
            fix="choose sizes that occur in the data, or add such a sample to verify the artifact on",
        )
    return found[-count:]


def static_shapes(model: ir.Model, dims: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Return the static shape of every tensor that keeps its name when the dimensions are fixed."""
    fixed = model.clone()
    specialize(fixed, dims)
    values = [
        *fixed.graph.inputs,
        *fixed.graph.initializers.values(),
        *(o for n in fixed.graph for o in n.outputs),
    ]
    shapes = {v.name or "": static_shape(v) for v in values}
    return {name: shape for name, shape in shapes.items() if shape is not None}


def refuse_dynamic_outputs(model: ir.Model, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that every graph output has a static shape.

    Args:
        model: The normalized model.
        shapes: Static shape of every tensor that has one at the sizes to compile for.

    Raises:
        ModelError: An output has none; the message names the node that is the cause.
    """
    for value in model.graph.outputs:
        if isinstance(value.type, ir.TensorType) and value.name in shapes:
            continue
        cause = _cause(value, shapes)
        tensor = value.type is None or isinstance(value.type, ir.TensorType)
        what = "the output has no fixed shape" if tensor else "the output is no tensor"
        raise ModelError(
            f"{what}: {_reason(cause)}" if cause is not None and tensor else what,
            where=f"output '{value.name}'",
            fix="an artifact is compiled for fixed shapes: make this size a constant, remove the output, "
            "or use `bitwright quantize`, whose model runs in ONNX Runtime",
        )


def _cause(value: ir.Value, shapes: Mapping[str, tuple[int, ...]]) -> ir.Node | None:
    """Return the first node on the way to ``value`` that makes a dynamic shape from static ones."""
    node = value.producer()
    while node is not None:
        dynamic = [
            v for v in node.inputs if v is not None and v.name not in shapes and constant_array(v) is None
        ]
        behind = next((v.producer() for v in dynamic if v.producer() is not None), None)
        if behind is None:
            return node
        node = behind
    return None


def _reason(node: ir.Node) -> str:
    label = f"node '{node_label(node)}' ({node.op_type})"
    trips = node.inputs[0] if is_op(node, "Loop") else None
    if trips is not None and constant_array(trips) is None:
        kind = "input" if trips.is_graph_input() else "computed value"
        return f"{label} repeats as often as {kind} '{trips.name}' says, and every iteration makes it larger"
    return f"what {label} computes has a size that depends on data"
