"""Which fixed shape an artifact is compiled for: what the user names, else what the data shows most often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import islice

import numpy as np
import onnx_ir as ir

from bitwright.compiler.errors import DataError, UsageError, nearest
from bitwright.compiler.graph.model import static_shape
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
            if isinstance(dim, ir.SymbolicDim):
                sizes[dim.value if dim.value is not None else f"{value.name}:{axis}"] = array.shape[axis]
    return sizes


def choose_dims(
    model: ir.Model, samples: Iterable[Mapping[str, np.ndarray]], wanted: Mapping[str, int]
) -> dict[str, int]:
    """Return a size for every dynamic dimension.

    Args:
        model: The model, for its inputs.
        samples: Single samples.
        wanted: Sizes the user fixed; the others come from the samples that agree with them, the most frequent
            combination first, the largest among equals.

    Raises:
        UsageError: ``wanted`` names no dynamic dimension.
    """
    known = dynamic_dims(model)
    for name in wanted:
        if name not in known:
            fix = nearest(name, known) if known else "the model has no dynamic dimensions: leave --dim out"
            msg = f"the model has no dynamic dimension '{name}'"
            raise UsageError(msg, where="--dim", fix=fix)
    counts: Counter[tuple[int, ...]] = Counter()
    for sample in islice(samples, EXAMINED_SAMPLES):
        sizes = dims_of_sample(model, sample) | dict(wanted)
        counts[tuple(sizes[name] for name in known)] += 1
    best = max(counts, key=lambda sizes: (counts[sizes], sizes))
    return dict(zip(known, best, strict=True))


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
