"""How much each quantizer costs: signal to quantization noise of every quantized tensor and of the outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from bitwright.compiler.ort.session import SessionConfig, open_session, run

# Reported for tensors that agree exactly (a ratio of infinity does not survive JSON).
PERFECT_DB = 200.0


class NoiseMeter:
    """Accumulates signal and noise of tensors, in float64.

    Args:
        power: 2 sums squares. 1 sums magnitudes, which a few bad samples do not outweigh.
    """

    def __init__(self, power: int = 2) -> None:
        self._power = power
        self._signal: dict[str, float] = {}
        self._noise: dict[str, float] = {}

    def add(self, name: str, reference: np.ndarray, actual: np.ndarray) -> None:
        """Account for one pair of equal-shaped float arrays."""
        exact = reference.astype(np.float64)
        noise = actual.astype(np.float64) - exact
        self._signal[name] = self._signal.get(name, 0.0) + float(np.sum(np.abs(exact) ** self._power))
        self._noise[name] = self._noise.get(name, 0.0) + float(np.sum(np.abs(noise) ** self._power))

    def sqnr_db(self) -> dict[str, float]:
        """Return ``10 log10(signal / noise)`` (of magnitudes, 20 log10) for each tensor, limited to 200 dB."""
        factor = 20.0 / self._power
        return {name: _decibel(self._signal[name], self._noise[name], factor) for name in self._signal}


def _decibel(signal: float, noise: float, factor: float) -> float:
    if noise == 0.0:
        return PERFECT_DB
    if signal == 0.0:
        return -PERFECT_DB
    return float(np.clip(factor * np.log10(signal / noise), -PERFECT_DB, PERFECT_DB))


def with_outputs(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """Return a copy of ``model`` whose outputs are the named values (weights are shared, not copied)."""
    copy = model.clone()
    values = {o.name: o for node in copy.graph for o in node.outputs}
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(values[name] for name in names)
    return copy


def layer_errors(
    float_model: ir.Model,
    quantized: ir.Model,
    tensors: Sequence[str],
    feeds: Iterable[Mapping[str, np.ndarray]],
    *,
    config: SessionConfig | None = None,
    power: int = 2,
) -> dict[str, float]:
    """Return the SQNR in dB of each named tensor and graph output.

    Args:
        float_model: The normalized float model.
        quantized: The Q/DQ model made from it.
        tensors: Names of tensors of ``float_model``; those that either model lacks are left out.
        feeds: A few samples.
        config: Session options that the quantized model needs.
        power: 1 compares magnitudes instead of squares.
    """
    outputs = [o.name or "" for o in float_model.graph.outputs]
    produced = _produced(float_model) & _produced(quantized)
    wanted = [t for t in dict.fromkeys(tensors) if t in produced and t not in outputs]
    dequantized = _dequantized_names(quantized)
    pairs = {t: dequantized.get(t, t) for t in wanted} | {o: o for o in outputs}
    config = config or SessionConfig()
    reference = open_session(with_outputs(float_model, list(pairs)), config)
    actual = open_session(with_outputs(quantized, list(dict.fromkeys(pairs.values()))), config)
    meter = NoiseMeter(power)
    for sample in feeds:
        exact, rounded = run(reference, sample), run(actual, sample)
        for name, other in pairs.items():
            if exact[name].dtype.kind == "f":
                meter.add(name, exact[name], rounded[other])
    return meter.sqnr_db()


def _produced(model: ir.Model) -> set[str]:
    return {o.name or "" for node in model.graph for o in node.outputs}


def _dequantized_names(quantized: ir.Model) -> dict[str, str]:
    """Return, for every quantized tensor, the name of its dequantized value."""
    found: dict[str, str] = {}
    for node in quantized.graph:
        value = node.inputs[0] if node.op_type == "QuantizeLinear" else None
        if value is not None and value.name:
            reader = next(use.node for use in node.outputs[0].uses())
            found[value.name] = reader.outputs[0].name or ""
    return found
