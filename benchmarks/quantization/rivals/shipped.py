"""An int8 model that came with the zoo, made by TensorFlow Lite's converter and rewritten as Q/DQ."""

from __future__ import annotations

import shutil

from zoo import folder

from quantization.job import Job


def quantize(job: Job) -> None:
    """Copy the file named in the settings."""
    shutil.copyfile(folder(job.model) / job.settings["file"], job.output)
