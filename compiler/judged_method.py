"""``--method judged``: how ranges are chosen is decided by samples that did not calibrate.

No method is best for every network: an outlier that one of them clips decides a class in another. The model is
quantized by each from one half of the samples and judged on the other half, then the other way round. The default stays
unless another method is better by more than such a comparison is uncertain.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bitwright.compiler.compilation import Compilation
from bitwright.compiler.equalization import FEWEST_SAMPLES, WORTHWHILE_DB, Observe, unseen_quality
from bitwright.compiler.frontend import samples_of
from bitwright.compiler.options import Options
from bitwright.compiler.plan.planner import RuntimeName

JUDGED = "judged"
# The default first. Percentiles that cut more, and divergence, were never better on a network of the benchmarks.
CANDIDATES = (Options.method, "minmax", "percentile:99.99")


def choose_method(c: Compilation, runtime: RuntimeName, observe_inputs: Observe) -> str:
    """Set ``c.options.method`` to the method that is best on unseen samples, and return a note of why.

    Args:
        c: Has a migrated model, its selection, and samples.
        runtime: Which of the two runtimes the model is quantized for.
        observe_inputs: Collects what rounding needs to know of a model's inputs.
    """
    assert c.model is not None
    samples, default = samples_of(c), CANDIDATES[0]
    if len(samples) < FEWEST_SAMPLES:
        c.options = replace(c.options, method=default)
        return f"ranges by {default}: fewer than {FEWEST_SAMPLES} samples cannot judge"
    asked, quality = c.options, {}
    for method in CANDIDATES:
        c.options = replace(asked, method=method)
        halves = [unseen_quality(c, runtime, c.model, samples, observe_inputs, first=k) for k in (0, 1)]
        quality[method] = float(np.mean([db for half in halves for db in half.values()]))
    best = max(CANDIDATES, key=lambda method: quality[method])
    if quality[best] < quality[default] + WORTHWHILE_DB:
        best = default
    c.options = replace(asked, method=best)
    shown = ", ".join(f"{method} {db:.1f} dB" for method, db in quality.items())
    return f"ranges by {best}: outputs and last layer on unseen samples {shown}"
