"""The options of every verb that quantizes, in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bitwright.compiler.cli import arguments as arg
from bitwright.compiler.cli.parsing import parse_budget, parse_dims, parse_drop


@dataclass(frozen=True)
class Quantization:
    """How a model is to be quantized, as it is written on the command line."""

    data: arg.Data = None
    validation: arg.Validation = None
    recipe: arg.Recipe = "int8"
    method: arg.Method = "mse"
    samples: arg.Samples = None
    dim: arg.Dims = None
    keep_float: arg.KeepFloat = None
    group: arg.Group = None
    budget: arg.Budget = None
    minimise: arg.Minimise = None
    loss: arg.Loss = "sqnr"
    evaluate: arg.Evaluate = None
    max_drop: arg.MaxDrop = None
    scheduler: arg.Scheduler = None
    workers: arg.Workers = 1
    cache: arg.Cache = None
    random_data: arg.RandomData = False
    unpadded: arg.Unpadded = False
    threads: arg.Threads = 1

    def values(self) -> dict[str, Any]:
        """Return the fields of :class:`~bitwright.compiler.options.Options`.

        Raises:
            UsageError: A value is not written as it should be.
        """
        return {
            "data": self.data,
            "validation": self.validation,
            "recipe": self.recipe,
            "method": self.method,
            "samples": self.samples,
            "dims": parse_dims(self.dim or ()),
            "keep_float": frozenset(self.keep_float or ()),
            "group": self.group,
            "budget": parse_budget(self.budget or ()),
            "objective": self.minimise,
            "loss": self.loss,
            "evaluate": self.evaluate,
            "max_drop": parse_drop(self.max_drop),
            "scheduler": self.scheduler,
            "workers": self.workers,
            "cache": self.cache,
            "random_data": self.random_data,
            "unpadded": self.unpadded,
            "threads": self.threads,
        }
