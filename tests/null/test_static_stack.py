"""Stack needs read from assembly."""

from __future__ import annotations

import pytest

from bitwright.compiler.errors import InternalError
from bitwright.compiler.lower.static_c.stack import EXTERNAL_BYTES, NET_RUN_BYTES, network_stack, stack_needs


def function(name: str, *lines: str) -> str:
    body = "\n".join(f"\t{line}" for line in lines)
    return f"\t.type\t{name},%function\n{name}:\n\t.fnstart\n{body}\n\t.size\t{name}, .Lend-{name}\n"


def test_pushes_subtractions_and_alignment_are_added() -> None:
    text = function(
        "kernel",
        "push.w\t{r4, r5, r6, r7, r8, r9, r10, r11, lr}",
        "add\tr7, sp, #12",
        "sub\tsp, #4",
        "vpush\t{d8, d9}",
        "sub.w\tsp, sp, #568",
        "mov\tr4, sp",
        "bfc\tr4, #0, #4",
        "mov\tsp, r4",
        "bfc\tr2, #13, #19",  # no alignment: the upper bits
        "blo\t.LBB0_1",
        "sub.w\tr4, r7, #80",
        "sub\tsp, r7, #80",  # the way back
        "pop.w\t{r4, r5, r6, r7, r8, r9, r10, r11, pc}",
    )
    assert stack_needs(text) == {"kernel": 9 * 4 + 4 + 2 * 8 + 568 + 15}


def test_32_bit_encodings_and_ranges_are_read() -> None:
    text = function(
        "kernel", "str\tlr, [sp, #-8]!", "stmdb\tsp!, {r4-r6, lr}", "vpush\t{s16}", "subw\tsp, sp, #1020"
    )
    assert stack_needs(text) == {"kernel": 8 + 16 + 4 + 1020}


def test_a_call_adds_the_deepest_callee() -> None:
    text = (
        function("leaf", "sub\tsp, #40", "bx\tlr")
        + function("deep", "sub\tsp, #400", "b\tleaf")
        + function("caller", "push\t{r7, lr}", "bl\tleaf", "bl\tdeep", "b\t.LBB2_1")
        + function("foreign", "push\t{r7, lr}", "bl\tmemcpy")
    )
    needs = stack_needs(text)
    assert needs == {"leaf": 40, "deep": 440, "caller": 448, "foreign": 8 + EXTERNAL_BYTES}
    assert network_stack([("leaf", 9), ("caller", 3)], needs) == NET_RUN_BYTES + 5 * 4 + 448


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (function("kernel", "sub.w\tsp, sp, r4"), "moves the stack pointer"),
        (function("kernel", "bl\tother") + function("other", "bl\tkernel"), "calls itself"),
    ],
)
def test_what_has_no_bound_is_refused(text: str, message: str) -> None:
    with pytest.raises(InternalError, match=message):
        stack_needs(text)
