"""``nncf.quantize``: static 8-bit post-training quantization."""

from __future__ import annotations

import nncf
import onnx

from quantization.job import Job


def quantize(job: Job) -> None:
    """Quantize; settings: ``transformer`` (SmoothQuant and the transformer scheme), ``fast_bias_correction``."""
    samples = list(job.samples())
    quantized = nncf.quantize(
        onnx.load(job.source),
        nncf.Dataset(samples),
        subset_size=len(samples),
        model_type=nncf.ModelType.TRANSFORMER if job.settings.get("transformer") else None,
        fast_bias_correction=job.settings.get("fast_bias_correction", True),
    )
    onnx.save(quantized, job.output)
