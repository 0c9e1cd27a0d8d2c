"""What one quantizing process is asked to do.

Imported by every rival's environment: numpy, onnx and the standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from zoo import Feeds, ZooModel, model_named


@dataclass(frozen=True)
class Job:
    """One model to be quantized in one way.

    Attributes:
        model: Zoo name.
        function: ``module:function`` that does it, called with this job.
        output: The .onnx file to write.
        settings: The tool's settings, as the function understands them.
    """

    model: str
    function: str
    output: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def zoo(self) -> ZooModel:
        """The zoo's entry."""
        return model_named(self.model)

    @property
    def source(self) -> Path:
        """The float model's file."""
        return self.zoo.path

    @property
    def work(self) -> Path:
        """Folder for intermediate files."""
        return Path(self.output).parent

    def samples(self) -> Iterator[Feeds]:
        """Yield the calibration samples, the same for every tool.

        ``settings["equal_length"]`` is for calibrators that cannot take inputs of different lengths: sequences are cut
        to the median length, and shorter ones are left out.
        """
        samples = self.zoo.samples()
        if self.settings.get("equal_length"):
            return _equal_length(list(samples))
        return samples

    def to_json(self) -> str:
        """Return the text that :func:`read_job` reads."""
        return json.dumps(asdict(self))


def _equal_length(samples: list[Feeds]) -> Iterator[Feeds]:
    lengths = [min(a.shape[1] for a in feeds.values()) for feeds in samples]
    wanted = int(np.median(lengths))
    for feeds, length in zip(samples, lengths, strict=True):
        if length >= wanted:
            yield {k: np.ascontiguousarray(a[:, :wanted]) for k, a in feeds.items()}


def read_job(text: str) -> Job:
    """Return the job of a :meth:`Job.to_json` text."""
    return Job(**json.loads(text))
