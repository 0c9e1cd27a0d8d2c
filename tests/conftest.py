"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def short_reported_timings() -> Iterator[None]:
    """Time models in rounds of 2 ms where the figure is only reported: 2 s less for every model that is quantized.

    What a figure decides (the no-regret gate, fused attention) is measured as always.
    """
    from bitwright.compiler.ort import timing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "REPORTED_ROUND_S", 0.002)
        yield
