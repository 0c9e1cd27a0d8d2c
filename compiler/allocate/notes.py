"""An allocation in words, for the log and the report."""

from __future__ import annotations

from collections import Counter

from bitwright.compiler.allocate.nearest import NAMES, figure
from bitwright.compiler.allocate.solve import GAP, Allocation, Price

# A solver that stops within this of the bound has, for a reader, proven its optimum.
_PROVEN = 2 * GAP


def allocation_notes(allocation: Allocation) -> list[str]:
    """Return lines on the mix of formats, the certificate, the price of every budget, and what was left out."""
    counts = Counter(allocation.formats.values())
    mix = ", ".join(f"{n} in {fmt}" for fmt, n in counts.most_common())
    name, value = NAMES[allocation.objective], figure(allocation.objective, allocation.value)
    proof = (
        "proven optimal"
        if is_proven(allocation)
        else f"at most {allocation.gap:.2%} above the optimum (the solver ran out of time)"
    )
    lines = [f"formats: {mix}", f"{name} {value}, {proof}, in {allocation.seconds:.2f} s"]
    lines += [_price(price, allocation) for price in allocation.prices]
    lines += [f"{d.group}: {d.format} left out: {d.reason}" for d in allocation.dropped]
    return lines


def is_proven(allocation: Allocation) -> bool:
    """Tell whether the solver stopped at the optimum, not at the end of its time."""
    return allocation.gap <= _PROVEN


def _price(price: Price, allocation: Allocation) -> str:
    used, limit = figure(price.metric, price.used), figure(price.metric, price.limit)
    head = f"{NAMES[price.metric]}: {used} of {limit}"
    if not price.binding:
        return f"{head}, not binding"
    name = NAMES[allocation.objective]
    more, then = figure(price.metric, price.more_limit), figure(allocation.objective, price.more_objective)
    gain = allocation.value - price.more_objective
    share = f" ({gain / abs(allocation.value):.1%} less)" if allocation.value and gain > 0 else ""
    bought = f"{name} {then}{share}" if gain > 0 else "nothing"
    return f"{head}, binding: {more} would buy {bought}"
