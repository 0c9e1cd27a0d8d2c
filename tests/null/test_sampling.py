"""The next token: what may be drawn, how often, and that equal seeds draw the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from bitwright.compiler.decoding.sampling import Sampler, Sampling, candidates
from bitwright.compiler.errors import ModelError, UsageError

LOGITS = arrays.arrays(np.float32, st.integers(1, 40), elements=st.floats(-30, 30, width=32))
TEMPERATURES = st.floats(0.05, 5)


@given(LOGITS)
def test_without_a_temperature_the_most_probable_token_is_taken(logits: np.ndarray) -> None:
    found = Sampler(Sampling()).choose(logits)
    assert found == int(np.argmax(logits))


@given(LOGITS, TEMPERATURES, st.integers(1, 50))
def test_top_k_leaves_no_token_that_is_less_probable_than_one_it_drops(
    logits: np.ndarray, temperature: float, top_k: int
) -> None:
    kept, probabilities = candidates(logits, Sampling(temperature, top_k=top_k))
    assert 1 <= len(kept) <= min(top_k, len(logits))
    dropped = np.setdiff1d(np.arange(len(logits)), kept)
    # What rounds to probability 0 in float64 may be dropped whatever its rank.
    if len(kept) == min(top_k, len(logits)) and len(dropped):
        assert logits[kept].min() >= logits[dropped].max()
    assert (np.diff(probabilities) <= 0).all() and probabilities.sum() == pytest.approx(1)


@given(LOGITS, TEMPERATURES, st.floats(0.01, 1))
def test_top_p_keeps_the_fewest_tokens_that_reach_the_share(
    logits: np.ndarray, temperature: float, top_p: float
) -> None:
    kept, probabilities = candidates(logits, Sampling(temperature, top_p=top_p))
    everything = candidates(logits, Sampling(temperature))[1]
    assert len(kept) == 1 or probabilities[:-1].sum() < top_p
    assert len(kept) == len(everything) or probabilities.sum() >= top_p - 1e-12


@given(LOGITS, st.integers(0, 2**32))
def test_one_candidate_is_no_choice(logits: np.ndarray, seed: int) -> None:
    best = int(np.argmax(logits))
    assert Sampler(Sampling(1.0, top_k=1, seed=seed)).choose(logits) == best
    assert Sampler(Sampling(1.0, top_p=1e-9, seed=seed)).choose(logits) == best


@given(LOGITS, st.integers(0, 2**32))
def test_equal_seeds_draw_equal_tokens(logits: np.ndarray, seed: int) -> None:
    first, second = (Sampler(Sampling(1.5, seed=seed)) for _ in range(2))
    assert [first.choose(logits) for _ in range(5)] == [second.choose(logits) for _ in range(5)]


def test_what_a_seed_draws_does_not_change() -> None:
    logits = np.linspace(0, 3, 16, dtype=np.float32)
    sampler = Sampler(Sampling(1.0, seed=7))
    assert [sampler.choose(logits) for _ in range(8)] == [11, 6, 9, 14, 14, 6, 15, 8]


def test_tokens_are_drawn_as_often_as_they_are_probable() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    sampler = Sampler(Sampling(1.0))
    counts = np.bincount([sampler.choose(logits) for _ in range(4000)], minlength=3) / 4000
    # Four standard deviations of a share of 4000 draws.
    assert np.abs(counts - [0.5, 0.3, 0.2]).max() < 4 * (0.25 / 4000) ** 0.5


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf, 0.1], np.float32)
    sampler = Sampler(Sampling(2.0))
    assert {sampler.choose(logits) for _ in range(50)} == {1, 3}


@pytest.mark.parametrize("values", [[0.0, np.nan], [np.inf, 0.0], [-np.inf, -np.inf]])
def test_logits_that_are_not_finite_are_refused(values: list[float]) -> None:
    with pytest.raises(ModelError, match="not finite"):
        Sampler(Sampling()).choose(np.array(values, np.float32))


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"temperature": -1.0}, "--temperature"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"temperature": 1.0, "top_k": 0}, "--top-k"),
        ({"temperature": 1.0, "top_p": 0.0}, "--top-p"),
        ({"temperature": 1.0, "top_p": 1.5}, "--top-p"),
        ({"seed": -1}, "--seed"),
        ({"top_k": 5}, "--top-k"),
        ({"top_p": 0.5}, "--top-p"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, float], where: str) -> None:
    with pytest.raises(UsageError) as caught:
        Sampling(**options)  # type: ignore[arg-type]
    assert caught.value.where == where and caught.value.fix
