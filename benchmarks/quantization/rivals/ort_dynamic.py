"""``onnxruntime.quantization.quantize_dynamic``."""

from __future__ import annotations

from onnxruntime.quantization import QuantType, quantize_dynamic

from quantization.job import Job
from quantization.rivals.ort_static import preprocessed


def quantize(job: Job) -> None:
    """Quantize with dynamic activation scales; setting: ``per_channel``."""
    quantize_dynamic(
        str(preprocessed(job)),
        job.output,
        per_channel=job.settings.get("per_channel", False),
        weight_type=QuantType.QInt8,
    )
