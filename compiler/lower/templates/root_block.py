"""The root block that Relax passes expect around a function body."""

from __future__ import annotations

from tvm import s_tir, tirx


def with_root_block(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """Wrap the body of ``function`` in one opaque root ``SBlock``.

    Relax passes that look into TensorIR (``RewriteDataflowReshape``, ``FuseTIR``, ...) insist on a
    single root block, which hand-written loops do not have. The meaning of the function does not change.

    Args:
        function: A ``s_tir`` function without blocks.

    Returns:
        The same function around a root block.
    """
    block = s_tir.SBlock([], [], [], "root", function.body)
    return function.with_body(s_tir.SBlockRealize([], tirx.const(True, "bool"), block))
