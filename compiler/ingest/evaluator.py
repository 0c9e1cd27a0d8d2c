"""The user's accuracy metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real

import numpy as np

from bitwright.compiler.errors import DataError, UsageError
from bitwright.compiler.ingest.user_code import blaming, load_function

Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
Metric = Callable[[Run], float]


def load_eval(spec: str) -> Metric:
    """Load the function that measures a model's accuracy.

    Args:
        spec: ``FILE.py:FUNC``. FUNC gets ``run``, which takes input name -> array and returns output name ->
            array, and returns a number; higher is better.

    Returns:
        FUNC with its result checked. It raises UsageError for a result that is not a number, DataError for
        one that is not finite and for any exception of FUNC; errors that ``run`` raises pass through.

    Raises:
        UsageError: The file or function does not exist.
        DataError: The script raises when it is loaded.
    """
    function, path = load_function(spec)

    def metric(run: Run) -> float:
        with blaming(path, spec):
            result = function(run)
        if isinstance(result, np.ndarray) and result.ndim == 0:
            result = result[()]
        if isinstance(result, bool | np.bool_) or not isinstance(result, Real):
            what = f"returned {type(result).__name__}, not a number"
            raise UsageError(what, where=spec, fix="return one float; higher is better")
        if not math.isfinite(result):
            what = f"returned {float(result)}"
            raise DataError(what, where=spec, fix="return a finite number; check for a division by zero")
        return float(result)

    return metric
