"""``onnxruntime.quantization.quantize_static``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from zoo import Feeds

from quantization.job import Job
from quantization.rivals.onnx_opset import at_opset

PER_CHANNEL_OPSET = 13


class Reader(CalibrationDataReader):
    """Hands the samples to ONNX Runtime one by one."""

    def __init__(self, samples: Iterator[Feeds]) -> None:
        self._samples = samples

    def get_next(self) -> Feeds | None:
        """Return the next sample."""
        return next(self._samples, None)


def preprocessed(job: Job) -> Path:
    """Return the model after the documented preparation; symbolic shapes are left out where they fail."""
    source = at_opset(job.source, job.work, PER_CHANNEL_OPSET)
    prepared = job.work / "prepared.onnx"
    try:
        quant_pre_process(str(source), str(prepared))
    except Exception as error:
        print("quant_pre_process:", error, "- again with skip_symbolic_shape=True")
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    return prepared


def attention_products(path: Path) -> list[str]:
    """Return the MatMuls of two activations."""
    graph = onnx.load(path, load_external_data=False).graph
    constants = {i.name for i in graph.initializer} | {
        o for n in graph.node if n.op_type == "Constant" for o in n.output
    }
    return [n.name for n in graph.node if n.op_type == "MatMul" and n.input[1] not in constants]


def quantize(job: Job) -> None:
    """Quantize; settings: ``activation``, ``weight``, ``per_channel``, ``method``, ``linear_only``.

    ``linear_only`` is the setting a practised user finds for transformers: MatMuls with a constant weight only, and no
    quantizer behind them.
    """
    prepared = preprocessed(job)
    s = job.settings
    extra = {}
    linear = {}
    if s.get("linear_only"):
        extra["OpTypesToExcludeOutputQuantization"] = ["MatMul"]
        linear = {"op_types_to_quantize": ["MatMul"], "nodes_to_exclude": attention_products(prepared)}
    quantize_static(
        str(prepared),
        job.output,
        Reader(job.samples()),
        per_channel=s.get("per_channel", False),
        activation_type=QuantType[s.get("activation", "QInt8")],
        weight_type=QuantType[s.get("weight", "QInt8")],
        calibrate_method=CalibrationMethod[s.get("method", "MinMax")],
        extra_options=extra,
        **linear,
    )
