"""What single layers cost the outputs: the quantized model is run again with one layer's rounding taken back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bitwright.compiler.ort.layer_error import PERFECT_DB, NoiseMeter
from bitwright.compiler.ort.replaced_layer import compute_in_float, pass_quantizer
from bitwright.compiler.ort.session import SessionConfig, open_session, run
from bitwright.passes.restore_float import Part, RestoreFloat

# Less than this cannot be told from the noise of a few samples.
WORTHWHILE_DB = 0.3
Feeds = Sequence[Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class WhatIf:
    """What the outputs would gain.

    Attributes:
        node: The layer.
        gain_db: Gain in SQNR, of the output that gains most, if the layer were computed in float.
        inputs_db: If only its inputs were not rounded; None where its kernel has no quantizers to leave out.
        weights_db: If only its weights were not rounded; None likewise.
        output_db: If only its output was not rounded; None where a layer behind it reads integers, or nobody rounds.
    """

    node: str
    gain_db: float
    inputs_db: float | None
    weights_db: float | None
    output_db: float | None = None


def what_if_float(
    float_model: ir.Model,
    quantized: ir.Model,
    nodes: Sequence[str],
    feeds: Feeds,
    *,
    unread: Mapping[str, str] | None = None,
    config: SessionConfig | None = None,
) -> tuple[WhatIf, ...]:
    """Measure what each of a few layers costs the outputs, the most expensive first.

    A layer that cannot be taken back alone, because the quantized model lacks what it reads, is left out.

    Args:
        float_model: The float model.
        quantized: The Q/DQ model made from it.
        nodes: Names of layers to try, each alone.
        feeds: A few samples.
        unread: Layer -> the tensor it writes, where a quantizer follows only because the layer itself is quantized:
            in float it would not be there.
        config: Session options that the quantized model needs.
    """
    config, unread = config or SessionConfig(), unread or {}
    reference = open_session(float_model, config)
    exact = [run(reference, sample) for sample in feeds]

    def noise(model: ir.Model) -> dict[str, float]:
        return output_noise(model, feeds, exact, config)

    def gain(model: ir.Model) -> float:
        found = noise(model)
        return max((found[name] - base[name] for name in base), default=0.0)

    def part(node: str, *parts: Part) -> float | None:
        model = quantized.clone()
        changed = RestoreFloat(frozenset([node]), float_model, frozenset(parts)).run(model).changed
        if len(parts) == 2 and node in unread:
            pass_quantizer(model, unread[node])
        return gain(model) if changed else None

    def output(node: str) -> float | None:
        model = quantized.clone()
        return gain(model) if node in unread and pass_quantizer(model, unread[node]) else None

    def trial(node: str) -> WhatIf | None:
        whole = part(node, "weights", "inputs")
        if whole is not None:
            inputs, weights = part(node, "inputs") or 0.0, part(node, "weights") or 0.0
            return WhatIf(node, whole, inputs, weights, output(node))
        model = quantized.clone()
        return WhatIf(node, gain(model), None, None) if compute_in_float(model, float_model, node) else None

    base = noise(quantized)
    trials = [found for found in map(trial, nodes) if found is not None]
    return tuple(sorted(trials, key=lambda t: -t.gain_db))


def output_noise(
    model: ir.Model, feeds: Feeds, exact: Sequence[Mapping[str, np.ndarray]], config: SessionConfig
) -> dict[str, float]:
    """Return the SQNR in dB of every floating-point output; one that is exact counts as 200 dB."""
    session = open_session(model, config)
    meter = NoiseMeter()
    for sample, values in zip(feeds, exact, strict=True):
        found = run(session, sample)
        for name, value in values.items():
            if value.dtype.kind == "f" and value.size:
                meter.add(name, value, found[name])
    return {name: min(value, PERFECT_DB) for name, value in meter.sqnr_db().items()}
