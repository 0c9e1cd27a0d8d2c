"""Where several processes run the tests (``-n 2 --dist loadgroup``): files that make something once stay together."""

from __future__ import annotations

import pytest

# Files whose tests share a bundle, a store or a deployment that takes seconds to make.
SHARING = {
    "test_allocation",
    "test_arm_counting",
    "test_arm_runner",
    "test_bench_bundle",
    "test_buckets",
    "test_c_runtime",
    "test_cli_bundle",
    "test_dynamic",
    "test_hybrid",
    "test_pipeline",
    "test_probe",
    "test_report",
    "test_report_advice",
    "test_runner",
    "test_sweep",
    "test_tuning",
    "test_verify",
    "test_weight_only_pipeline",
    "test_weight_only_zoo",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of each of these files into a group of its own."""
    for item in items:
        if item.path.stem in SHARING:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
