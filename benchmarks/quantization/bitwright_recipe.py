"""Bitwright itself, by its public function."""

from __future__ import annotations

import bitwright
from quantization.job import Job


def quantize(job: Job) -> None:
    """Quantize for ONNX Runtime on this machine; the settings are fields of ``bitwright.Options``."""
    bitwright.quantize(job.source, target="host", data=list(job.samples()), output=job.output, **job.settings)
