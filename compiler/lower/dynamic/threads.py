"""Loops of an extent that is known at run time, by threads where that pays."""

from __future__ import annotations

from collections.abc import Callable

from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.float.vectors import keep
from bitwright.compiler.lower.templates.scaffold import Expr

# Pieces and not turns: TVM allocates what is inside a parallel loop anew for each of its iterations.
TASKS = 16


def spread(extent: Expr, pays: Expr, emit: Callable[[Expr], None]) -> None:
    """Run ``emit(i)`` for every i below ``extent``.

    Args:
        extent: An int64 expression.
        pays: Whether there is enough work for threads.
        emit: Writes one turn; called twice, for the loop with threads and the one without.
    """
    with T.If(pays):
        with T.Then(), T.parallel(TASKS) as task:
            first = keep(extent * task // TASKS)
            count = keep(extent * (task + 1) // TASKS - first)
            with T.serial(count) as turn:
                emit(keep(first + turn))
        with T.Else(), T.serial(extent) as turn:
            emit(turn)
