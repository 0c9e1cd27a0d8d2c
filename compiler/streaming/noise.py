"""How far quantized parts are from float ones: what each layer adds, and what has accumulated up to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from bitwright.compiler.compilation import Compilation
from bitwright.compiler.ort.layer_error import NoiseMeter, with_outputs
from bitwright.compiler.ort.own_error import own_errors
from bitwright.compiler.ort.session import SessionConfig, open_session, run

Feeds = Iterable[Mapping[str, np.ndarray]]


def measure_noise(c: Compilation, exact: Feeds, actual: Feeds, config: SessionConfig) -> None:
    """Fill in the errors of one part's layers, as an audit of the whole model would.

    Args:
        c: The part, quantized.
        exact: Samples as the float model makes them up to here.
        actual: The same samples as the quantized parts make them.
        config: Session options of the quantized model.
    """
    assert c.model is not None and c.quantized is not None and c.plan is not None and c.selection is not None
    written = {u.name: u.output.name or "" for u in c.selection.units}
    layers = [written[n] for n, d in c.plan.nodes.items() if d.format != "float" and n in written]
    outputs = [v.name or "" for v in c.model.graph.outputs]
    made = {o.name for n in c.quantized.graph for o in n.outputs}
    names = [n for n in dict.fromkeys((*layers, *outputs)) if n in made]
    meter, kept = NoiseMeter(), list(exact)
    # One session after the other: the weights of both parts, as kernels want them, are not in memory together.
    reference = open_session(with_outputs(c.model, names), config)
    expected = [run(reference, before) for before in kept]
    del reference
    rounded = open_session(with_outputs(c.quantized, names), config)
    for right, after in zip(expected, actual, strict=True):
        found = run(rounded, after)
        for name in names:
            if right[name].dtype.kind == "f":
                meter.add(name, _finite(right[name]), _finite(found[name]))
        right.clear()
    c.sqnr_db = meter.sqnr_db()
    del rounded
    c.own_db = own_errors(c.model, c.quantized, layers, kept, config=config)


def _finite(array: np.ndarray) -> np.ndarray:
    """Return an array whose infinities (a mask's) are the largest numbers, so that equal ones differ by nothing."""
    if np.isfinite(array).all():
        return array
    largest = float(np.finfo(np.float32).max)
    return np.nan_to_num(array.astype(np.float64), nan=0.0, posinf=largest, neginf=-largest)
