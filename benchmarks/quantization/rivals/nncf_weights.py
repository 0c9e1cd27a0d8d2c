"""``nncf.compress_weights``: 4-bit weight-only quantization."""

from __future__ import annotations

from typing import Any

import nncf
import onnx

from quantization.job import Job
from quantization.rivals.onnx_opset import at_opset


def quantize(job: Job) -> None:
    """Quantize; settings: ``mode``, ``group_size``, ``data_aware`` (AWQ and scale estimation)."""
    model = onnx.load(at_opset(job.source, job.work, 21))
    data: dict[str, Any] = {}
    if job.settings.get("data_aware"):
        samples = list(job.samples())
        data = {
            "dataset": nncf.Dataset(samples),
            "subset_size": len(samples),
            "awq": True,
            "scale_estimation": True,
        }
    compressed = nncf.compress_weights(
        model,
        mode=nncf.CompressWeightsMode[job.settings["mode"]],
        group_size=job.settings["group_size"],
        **data,
    )
    onnx.save(compressed, job.output)
