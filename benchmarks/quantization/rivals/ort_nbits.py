"""``onnxruntime.quantization.matmul_nbits_quantizer``: group-wise weight-only quantization."""

from __future__ import annotations

import onnx
from onnxruntime.quantization import matmul_nbits_quantizer as nbits

from quantization.job import Job
from quantization.rivals.onnx_opset import at_opset
from quantization.rivals.ort_static import Reader

MATMUL_NBITS_OPSET = 21


def _algorithm(job: Job) -> nbits.WeightOnlyQuantConfig | None:
    """Return the configuration of the algorithm named in the settings; None is round to nearest."""
    name = job.settings.get("algorithm", "rtn")
    if name == "k_quant":
        return nbits.KQuantWeightOnlyQuantConfig()
    if name == "gptq":
        # The reader is copied for every layer, which a generator would not survive.
        return nbits.GPTQWeightOnlyQuantConfig(
            calibration_data_reader=Reader(iter(list(job.samples()))),
            block_size=job.settings["block_size"],
            actorder=job.settings.get("actorder", False),
            mse=job.settings.get("mse", False),
            perchannel=False,
        )
    if name == "hqq":
        return nbits.HQQWeightOnlyQuantConfig(
            block_size=job.settings["block_size"], bits=job.settings.get("bits", 4)
        )
    return None


def quantize(job: Job) -> None:
    """Quantize; settings: ``algorithm``, ``bits``, ``block_size``, ``symmetric``."""
    model = onnx.load(at_opset(job.source, job.work, MATMUL_NBITS_OPSET))
    quantizer = nbits.MatMulNBitsQuantizer(
        model,
        bits=job.settings.get("bits", 4),
        block_size=job.settings["block_size"],
        is_symmetric=job.settings.get("symmetric", True),
        accuracy_level=job.settings.get("accuracy_level"),
        algo_config=_algorithm(job),
    )
    quantizer.process()
    quantizer.model.save_model_to_file(job.output, False)
