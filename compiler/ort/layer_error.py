"""How much each quantizer costs: signal to quantization noise of every quantized tensor and of the outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from bitwright.compiler.ort.session import SessionConfig, open_session, run

# Reported for tensors that agree exactly (a ratio of infinity does not survive JSON).
PERFECT_DB = 200.0


class NoiseMeter:
    """Accumulates signal and noise energy of tensors, in float64."""

    def __init__(self) -> None:
        self._signal: dict[str, float] = {}
        self._noise: dict[str, float] = {}

    def add(self, name: str, reference: np.ndarray, actual: np.ndarray) -> None:
        """Account for one pair of equal-shaped float arrays."""
        exact = reference.astype(np.float64)
        self._signal[name] = self._signal.get(name, 0.0) + float(np.sum(exact * exact))
        self._noise[name] = self._noise.get(name, 0.0) + float(
            np.sum((actual.astype(np.float64) - exact) ** 2)
        )

    def sqnr_db(self) -> dict[str, float]:
        """Return ``10 log10(signal / noise)`` for each tensor, limited to 200 dB."""
        return {name: _decibel(self._signal[name], self._noise[name]) for name in self._signal}


def _decibel(signal: float, noise: float) -> float:
    if noise == 0.0:
        return PERFECT_DB
    if signal == 0.0:
        return -PERFECT_DB
    return float(np.clip(10.0 * np.log10(signal / noise), -PERFECT_DB, PERFECT_DB))


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
    threads: int = 1,
) -> dict[str, float]:
    """Return the SQNR in dB of each named tensor and graph output.

    Args:
        float_model: The normalized float model.
        quantized: The Q/DQ model made from it.
        tensors: Names of quantized tensors of ``float_model``.
        feeds: A few samples.
        threads: For ONNX Runtime.
    """
    outputs = [o.name or "" for o in float_model.graph.outputs]
    produced = {o.name for node in float_model.graph for o in node.outputs}
    wanted = [t for t in tensors if t in produced and t not in outputs]
    pairs = {t: _dequantized_name(quantized, t) for t in wanted} | {o: o for o in outputs}
    config = SessionConfig(threads=threads)
    reference = open_session(with_outputs(float_model, list(pairs)), config)
    actual = open_session(with_outputs(quantized, list(dict.fromkeys(pairs.values()))), config)
    meter = NoiseMeter()
    for sample in feeds:
        exact, rounded = run(reference, sample), run(actual, sample)
        for name, other in pairs.items():
            if exact[name].dtype.kind == "f":
                meter.add(name, exact[name], rounded[other])
    return meter.sqnr_db()


def _dequantized_name(quantized: ir.Model, tensor: str) -> str:
    for node in quantized.graph:
        if node.op_type == "QuantizeLinear" and node.inputs[0] is not None and node.inputs[0].name == tensor:
            (reader, *_) = [use.node for use in node.outputs[0].uses()]
            return reader.outputs[0].name or ""
    return tensor
