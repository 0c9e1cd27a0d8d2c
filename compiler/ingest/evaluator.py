"""The accuracy metric: the user's function, or the perplexity of a decoder."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path

import numpy as np

from bitwright.compiler.decoding.perplexity import PerplexityMetric
from bitwright.compiler.errors import DataError, UsageError
from bitwright.compiler.ingest.token_source import GRAMMAR, parse_token_source, read_stream
from bitwright.compiler.ingest.user_code import blaming, load_function

Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
Metric = Callable[[Run], float]
PERPLEXITY = "perplexity"


def load_eval(spec: str) -> Metric:
    """Load what measures a model's accuracy.

    Args:
        spec: ``perplexity:TOKENS``, see :func:`load_perplexity`; or ``FILE.py:FUNC``. FUNC gets ``run``, which takes
            input name -> array and returns output name -> array, and returns a number; higher is better.

    Returns:
        FUNC with its result checked. It raises UsageError for a result that is not a number, DataError for
        one that is not finite and for any exception of FUNC; errors that ``run`` raises pass through.

    Raises:
        UsageError: The file or function does not exist.
        DataError: The script raises when it is loaded; the tokens cannot be read.
    """
    if is_perplexity(spec):
        return load_perplexity(spec)
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


def is_perplexity(spec: str) -> bool:
    """Tell whether a metric is the built-in perplexity."""
    return spec.partition(":")[0] == PERPLEXITY


def load_perplexity(spec: str) -> PerplexityMetric:
    """Load the tokens that a decoder's perplexity is measured on.

    Args:
        spec: ``perplexity:TOKENS``, where TOKENS is what
            :func:`~bitwright.compiler.ingest.token_source.parse_token_source` reads.

    Raises:
        UsageError: There is no such file, or an option is wrong.
        DataError: The file holds no stream of tokens, or one that is shorter than a window.
        ToolchainError: A text needs the package ``tokenizers``, which is not installed.
    """
    name, _, text = spec.partition(":")
    if name != PERPLEXITY or not text:
        what = "the perplexity of which tokens?"
        raise UsageError(what, where=f"--eval {spec}", fix=f"--eval perplexity:TOKENS, {GRAMMAR}")
    source = parse_token_source(text)
    stream = read_stream(source)
    source.windows.starts(len(stream.tokens))  # too short a stream is refused before any work is done
    return PerplexityMetric(text, stream.tokens, source.windows, stream.bytes_per_token)


def eval_digest(spec: str) -> str:
    """Return a digest that changes with the file that a metric comes from."""
    file = parse_token_source(spec.partition(":")[2]).path if is_perplexity(spec) else spec.rpartition(":")[0]
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
