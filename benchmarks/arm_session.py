"""Executed by the emulated interpreter: runs a model in ONNX Runtime 1 + N + 2N times and marks the points between.

usage: python arm_session.py MODEL INPUTS.npz N SESSION.json

It imports nothing but numpy and ONNX Runtime, and it asks for a process group that nobody has as its mark: the
instruction counter (targets/toolchain/block_counter.c) notes how much was executed until then.
"""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

MARK = 0x62770000
WARM_UP = 2


def mark(number: int) -> None:
    """Have the counter note a point."""
    with contextlib.suppress(OSError):
        os.getpgid(MARK + number)


def main(model: str, inputs: str, count: int, config: dict[str, Any]) -> None:
    """Run the model; inputs and outputs are bound, so that little of Python is in the count."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    for name, value in config["session_config_entries"].items():
        options.add_session_config_entry(name, value)
    session = ort.InferenceSession(
        model, options, providers=["CPUExecutionProvider"], disabled_optimizers=config["disabled_optimizers"]
    )
    binding = session.io_binding()
    with np.load(inputs) as feeds:
        for value in session.get_inputs():
            binding.bind_cpu_input(value.name, feeds[value.name])
    for value in session.get_outputs():
        binding.bind_output(value.name, "cpu")
    for phase, times in enumerate((WARM_UP, count, 2 * count)):
        for _ in range(times):
            session.run_with_iobinding(binding)
        mark(phase)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(Path(sys.argv[4]).read_text()))
