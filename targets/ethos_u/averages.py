"""Average pooling that changes the scale, which TensorFlow Lite's own operator cannot.

Averages vary less than what they average, so a scale of their own keeps more of them. Where every window has the same
number of elements it is a depthwise convolution with ones; else the integers are averaged first and rescaled then.
"""

from __future__ import annotations

from bitwright.compiler.program.ops import QPool, QuantParams


def as_products(step: QPool, x: QuantParams, y: QuantParams) -> bool:
    """Tell whether a pooling is written as a depthwise convolution with ones."""
    return step.kind == "average" and x != y and (step.count_include_pad or not any(step.pads))


def rescaled_behind(step: QPool, x: QuantParams, y: QuantParams) -> bool:
    """Tell whether the averages keep the input's scale and are rescaled by an operator of their own."""
    return step.kind == "average" and x != y and not as_products(step, x, y)
