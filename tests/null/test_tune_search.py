"""The search and its cost model, on times recorded of real kernels (one core of a Sapphire Rapids)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bitwright.compiler.tune.cost_model import CostModel, features_of
from bitwright.compiler.tune.search import BATCH, Search
from bitwright.targets.backend import KernelChoice

RECORDED = Path(__file__).parents[1] / "golden" / "kernel_times.json"


def tables() -> list[dict[KernelChoice, float]]:
    """Return the measured ratio of every candidate, in the template's cost order, for each workload."""
    recorded = json.loads(RECORDED.read_text())
    return [{KernelChoice.from_plain(row): row["ratio"] for row in rows} for rows in recorded.values()]


def shuffled(table: dict[KernelChoice, float], seed: int) -> dict[KernelChoice, float]:
    """Return the table in an order that helps nobody; the default stays in front."""
    default, *others = table
    order = np.random.default_rng(seed).permutation(len(others))
    return {choice: table[choice] for choice in (default, *(others[k] for k in order))}


def searched(table: dict[KernelChoice, float], trials: int, seed: int = 0) -> tuple[float, int]:
    """Return the best ratio a search finds with so many trials, and how many it used."""
    search, used = Search(list(table), seed=seed), 0
    while used < trials and not search.finished():
        proposed = search.propose(min(BATCH, trials - used))
        search.observe({choice: table[choice] for choice in proposed})
        used += len(proposed)
    return search.best[1], used


def test_the_search_finds_the_best_kernel_in_half_of_the_trials():
    for table in tables():
        best, used = searched(table, 26)
        assert best <= 1.02 * min(table.values())
        assert used <= 26 < len(table)


def test_the_model_beats_chance_where_the_order_tells_nothing():
    """24 of about 50 candidates; the mean over 20 orders of how far the best found is from the best there is."""
    model, chance = [], []
    for table in tables():
        if min(table.values()) > 0.98:
            continue  # nothing to find
        for seed in range(20):
            mixed = shuffled(table, seed)
            model.append(searched(mixed, 24, seed)[0] / min(table.values()))
            chance.append(min(list(mixed.values())[:25]) / min(table.values()))
    assert np.mean(np.log(model)) < 0.5 * np.mean(np.log(chance))


def test_the_model_predicts_kernels_it_has_not_seen():
    wrong = []
    for seed, table in enumerate(tables()):
        features, ratios = features_of(list(table)), np.array(list(table.values()))
        mixed = np.random.default_rng(seed).permutation(len(ratios))
        seen, unseen = mixed[::2], mixed[1::2]
        guess, hope = CostModel(features[seen], ratios[seen]).predict(features[unseen])
        assert (hope <= guess).all()
        wrong.append(np.std(np.log(ratios[unseen] / guess)) / np.std(np.log(ratios[unseen])))
    # What it gets wrong is less than the spread of what it has not seen: it has learned something.
    assert np.mean(wrong) < 0.75


def test_a_model_of_equal_times_predicts_just_that():
    features = features_of([KernelChoice("t", "i", (("n", k),)) for k in range(8)])
    guess, hope = CostModel(features, [0.5] * 8).predict(features)
    assert np.allclose(guess, 0.5)
    assert np.allclose(hope, 0.5, rtol=2e-3)


def choices(count: int) -> list[KernelChoice]:
    return [KernelChoice("t", "i", (("n", k),)) for k in range(count)]


def test_what_was_measured_is_not_proposed_again():
    search = Search(choices(40), dict.fromkeys(choices(20)[10:], 1.0))
    seen: set[KernelChoice] = set()
    while proposed := search.propose():
        assert not seen.intersection(proposed)
        seen.update(proposed)
        search.observe(dict.fromkeys(proposed, 1.0))
    assert len(seen) == 40 - 1 - 10
    assert search.finished()


def test_kernels_that_do_not_work_are_never_the_best():
    search = Search(choices(4))
    search.observe({choice: float("inf") for choice in choices(4)[1:]})
    assert search.best == (choices(4)[0], 1.0)
    assert search.leaders(4) == [choices(4)[0]]


def test_a_space_of_one_is_finished_at_once():
    assert Search(choices(1)).finished()


@pytest.mark.parametrize("gain", [0.0, 0.5])
def test_a_search_ends_when_nothing_more_is_expected(gain):
    """A flat space, and one whose only gain is in the first batch."""
    table = {choice: 1.0 - gain * (k == 3) for k, choice in enumerate(choices(200))}
    best, used = searched(table, 1000)
    assert best == 1.0 - gain
    assert used <= 60
