"""Budgets and boards as they are written on the command line."""

from __future__ import annotations

import pytest

from bitwright.compiler.errors import UsageError
from bitwright.compiler.tune.budget import OFF, TuneBudget, parse_budget
from bitwright.compiler.tune.farm import Farm, parse_farm, parse_tracker
from bitwright.targets.toolchain.host import read_name


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("60s", TuneBudget(seconds=60.0)),
        ("1.5m", TuneBudget(seconds=90.0)),
        ("2h", TuneBudget(seconds=7200.0)),
        ("200", TuneBudget(trials=200)),
        ("off", OFF),
    ],
)
def test_budgets(text, budget):
    assert parse_budget(text) == budget


@pytest.mark.parametrize(
    "text",
    ["", "60 parsecs", "60ms", "-5", "0", "0s", "1e9s", "nan", "inf", "2.5", "on", "6\u0660", "99999999h"],
)
def test_what_is_no_budget_is_refused_with_examples(text):
    with pytest.raises(UsageError) as caught:
        parse_budget(text)
    assert caught.value.where == "--tune" and "60s" in caught.value.fix


def test_a_budget_is_spent_by_time_or_by_trials():
    assert OFF.off and OFF.spent(0, 0)
    assert not TuneBudget(seconds=5).spent(4.9, 10**6)
    assert TuneBudget(seconds=5).spent(5, 0)
    assert TuneBudget(trials=5).spent(0, 5)
    assert not TuneBudget().spent(1e9, 10**9)


def test_farms():
    assert parse_farm(None, None) is None
    assert parse_farm("host:9190", "pi4") == Farm("pi4", "host:9190")
    assert parse_farm(None, "pi4") == Farm("pi4")
    assert parse_tracker("[::1]:9190") == ("::1", 9190)


@pytest.mark.parametrize(
    ("tracker", "key"),
    [
        ("host", "k"),
        ("host:", "k"),
        (":9190", "k"),
        ("h:70000", "k"),
        ("h:9x", "k"),
        ("h:1", None),
        (None, "a b"),
        (None, ""),
    ],
)
def test_what_is_no_farm_is_refused(tracker, key):
    with pytest.raises(UsageError, match=r"--(tracker|device-key)"):
        parse_farm(tracker, key)


def test_processors_are_known_by_name_and_numbers():
    x86 = "processor\t: 0\ncpu family\t: 6\nmodel\t\t: 143\nmodel name\t: Intel(R) Xeon(R)\nstepping\t: 8\n"
    assert read_name(x86) == "Intel(R) Xeon(R) 6-143-8"
    arm = "processor\t: 0\nCPU implementer\t: 0x41\nCPU variant\t: 0x3\nCPU part\t: 0xd0b\n"
    assert read_name(arm) == "implementer 0x41 part 0xd0b variant 0x3"
    assert read_name("") == ""
