"""What work costs besides the peak of an instruction."""

from __future__ import annotations

from pydantic import Field

from bitwright.targets.sections.record import NonNegative, Share, Strict


class Efficiency(Strict):
    """Achieved share of the peak, by kind of work: of the MACs, and of the bandwidth for elementwise."""

    gemm: Share = 0.5
    conv: Share = 0.5
    depthwise: Share = 0.1
    elementwise: Share = 0.5


class Overheads(Strict):
    """Costs that a roofline does not show.

    Attributes:
        per_op_s: Seconds to start one operator.
        onnxruntime_per_op_s: The same in ONNX Runtime, if it differs.
        quantize_cycles_per_element: Float to integer or back.
        requantize_cycles_per_element: Accumulator to output.
        layout_change_cycles_per_element: Channels-first to channels-last or back.
    """

    per_op_s: NonNegative = 1e-6
    onnxruntime_per_op_s: NonNegative | None = None
    quantize_cycles_per_element: NonNegative = 1.0
    requantize_cycles_per_element: NonNegative = 0.5
    layout_change_cycles_per_element: NonNegative = 1.0


class Energy(Strict):
    """What one operation and one byte cost, in picojoules; without this section no energy is estimated.

    Attributes:
        pj_per_mac: Compute row -> picojoules of one multiply-accumulate.
        pj_per_byte: Memory level -> picojoules of one byte read or written.
        static_w: Power drawn while the model runs, whatever it computes.
    """

    pj_per_mac: dict[str, NonNegative] = Field(min_length=1)
    pj_per_byte: dict[str, NonNegative] = Field(min_length=1)
    static_w: NonNegative = 0.0
