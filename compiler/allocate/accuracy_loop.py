"""From predicted to measured accuracy: groups go up one format until the real metric holds.

Losses of single layers do not add up exactly, so a plan that should hold the bound may not. The loop follows the
allocator's own ranking of moves and looks for the shortest prefix of it that holds, with few evaluations: steps that
double, then bisection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bitwright.compiler.allocate.moves import Move
from bitwright.compiler.errors import AccuracyGateError

Evaluate = Callable[[Mapping[str, str]], float]


@dataclass(frozen=True)
class Trial:
    """One measured assignment.

    Attributes:
        moves: How many moves were made.
        value: The metric; NaN counts as a failure.
        drop: Relative drop from float.
    """

    moves: int
    value: float
    drop: float


@dataclass(frozen=True)
class LoopResult:
    """What the loop ended with.

    Attributes:
        formats: Format by group; holds the bound, measured.
        moved: The moves that were made, in order.
        trial: The measurement of ``formats``.
        trials: All measurements, in the order in which they were made.
    """

    formats: dict[str, str]
    moved: tuple[Move, ...]
    trial: Trial
    trials: tuple[Trial, ...]


def relative_drop(float_value: float, value: float) -> float:
    """Return the loss of a metric relative to the float value (absolute where that is 0); infinite for NaN."""
    if not math.isfinite(value):
        return math.inf
    return (float_value - value) / (abs(float_value) or 1.0)


def hold_accuracy(
    evaluate: Evaluate,
    formats: Mapping[str, str],
    moves: Sequence[Move],
    *,
    float_value: float,
    max_drop: float,
) -> LoopResult:
    """Make as few of the moves as the bound needs.

    Args:
        evaluate: Measures the real metric of an assignment; higher is better.
        formats: The allocator's plan.
        moves: From :func:`bitwright.compiler.allocate.moves.upgrades`, best first.
        float_value: The metric of the float model.
        max_drop: Largest allowed relative drop.

    Returns:
        An assignment that was measured to hold the bound. If the metric rises with every move it is the one with the
        fewest moves; about ``2 log2(moves)`` assignments are measured.

    Raises:
        AccuracyGateError: Not even all moves hold the bound; the message says what is reachable.
    """
    trials: dict[int, Trial] = {}

    def holds(count: int) -> bool:
        if count not in trials:
            value = evaluate(after(formats, moves[:count]))
            trials[count] = Trial(count, value, relative_drop(float_value, value))
        return trials[count].drop <= max_drop

    failed, step = -1, 1
    count = 0
    while not holds(count):
        if count == len(moves):
            raise _unreachable(list(trials.values()), formats, moves, float_value, max_drop)
        failed, count, step = count, min(count + step, len(moves)), step * 2
    while count - failed > 1:
        middle = (failed + count) // 2
        failed, count = (failed, middle) if holds(middle) else (middle, count)
    return LoopResult(
        after(formats, moves[:count]), tuple(moves[:count]), trials[count], tuple(trials.values())
    )


def after(formats: Mapping[str, str], moves: Sequence[Move]) -> dict[str, str]:
    """Return an assignment with some moves made."""
    return dict(formats) | {m.group: m.after for m in moves}


def _unreachable(
    trials: Sequence[Trial],
    formats: Mapping[str, str],
    moves: Sequence[Move],
    float_value: float,
    max_drop: float,
) -> AccuracyGateError:
    best = min(trials, key=lambda t: (t.drop, t.moves))
    reached = after(formats, moves[: best.moves])
    counts = {fmt: list(reached.values()).count(fmt) for fmt in dict.fromkeys(reached.values())}
    mix = ", ".join(f"{n} in {fmt}" for fmt, n in counts.items())
    what = (
        f"no plan was found whose metric drops by at most {max_drop:.3%} from {float_value:.6g}; reachable is "
        f"{best.value:.6g}, a drop of {best.drop:.3%}, with {best.moves} of {len(moves)} groups moved up ({mix})"
    )
    return AccuracyGateError(
        what,
        where="--max-drop",
        fix=f"allow a drop of {best.drop:.3%}, widen the budgets, or allow formats of a smaller loss",
    )
