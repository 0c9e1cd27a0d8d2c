"""Perplexity on distributions that are known, windows that count every token once, streams as users name them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.compiler.decoding.perplexity import (
    PerplexityMetric,
    PerplexityResult,
    Windows,
    negative_log_likelihood,
)
from bitwright.compiler.decoding.ports import ModelRun, Port
from bitwright.compiler.errors import DataError, ModelError, UsageError
from bitwright.compiler.ingest.evaluator import eval_digest, load_eval
from bitwright.compiler.ingest.token_source import parse_token_source, read_stream

VOCABULARY = 16
INPUTS = (Port("ids", np.dtype(np.int64), ("N", "T")),)
OUTPUTS = (Port("scores", np.dtype(np.float32), ("N", "T", VOCABULARY)),)


def successor(probability: float, inputs: tuple[Port, ...] = INPUTS) -> ModelRun:
    """Return a model that gives token + 1 this probability and shares the rest among the others."""

    def call(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        following = (feeds["ids"] + 1) % VOCABULARY
        rest = (1 - probability) / (VOCABULARY - 1)
        scores = np.full((*following.shape, VOCABULARY), math.log(rest), np.float32)
        np.put_along_axis(scores, following[..., None], math.log(probability), -1)
        return {"scores": scores}

    return ModelRun(call, inputs, OUTPUTS)


def metric(windows: Windows, length: int = 100, bytes_per_token: float | None = None) -> PerplexityMetric:
    return PerplexityMetric("tokens", np.arange(length) % VOCABULARY, windows, bytes_per_token)


@pytest.mark.parametrize("windows", [Windows(10), Windows(10, stride=3), Windows(10, count=7), Windows(99)])
def test_a_known_distribution(windows: Windows) -> None:
    found = metric(windows, bytes_per_token=2.0).result(successor(0.25))
    # Logits are float32: relative errors of 1e-7 in sixteen terms.
    assert found.perplexity == pytest.approx(4.0, rel=1e-6)
    assert found.nll == pytest.approx(math.log(4.0), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(1.0, rel=1e-6)
    assert metric(windows)(successor(0.25)) == pytest.approx(-4.0, rel=1e-6)


def test_without_bytes_there_are_no_bits_for_each() -> None:
    assert PerplexityResult(1.0, 10).bits_per_byte is None


@given(st.integers(2, 300), st.integers(1, 40), st.data())
def test_one_stride_apart_every_token_counts_once(length: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.none() | st.integers(1, window))
    windows, tokens = Windows(window, stride), np.arange(length)
    if length < window + 1:
        with pytest.raises(DataError, match="do not fill a window"):
            windows.starts(length)
        return
    counted = [t for part, count in windows.cut(tokens) for t in part[-count:].tolist()]
    left = length - 1 - len(counted)
    assert counted == list(range(1, len(counted) + 1))
    assert 0 <= left < (stride or window)


@given(st.integers(30, 500), st.integers(1, 20))
def test_evenly_spaced_windows_lie_inside(length: int, count: int) -> None:
    starts = Windows(20, count=count).starts(length)
    assert len(starts) == count and starts[0] == 0 and starts == sorted(starts)
    assert starts[-1] + 20 < length


def test_losses_equal_the_definition_in_any_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    logits, targets = random.normal(0, 5, (11, 7)).astype(np.float32), random.integers(0, 7, 11)
    exact = logits.astype(np.float64)
    expected = -np.log(np.exp(exact) / np.exp(exact).sum(-1, keepdims=True))[np.arange(11), targets]
    whole = negative_log_likelihood(logits, targets)
    np.testing.assert_allclose(whole, expected, rtol=1e-12)
    monkeypatch.setattr("bitwright.compiler.decoding.perplexity.BLOCK_ELEMENTS", 20)
    np.testing.assert_array_equal(negative_log_likelihood(logits, targets), whole)


def test_large_logits_do_not_overflow() -> None:
    np.testing.assert_allclose(negative_log_likelihood(np.array([[1e4, 0.0]]), np.array([1])), [1e4])


def test_logits_that_are_not_finite_are_refused() -> None:
    run = ModelRun(lambda feeds: {"scores": np.full((1, 5, VOCABULARY), np.nan, np.float32)}, INPUTS, OUTPUTS)
    with pytest.raises(ModelError, match="not finite"):
        metric(Windows(5)).result(run)


def test_logits_of_the_last_token_alone_are_refused() -> None:
    run = ModelRun(lambda feeds: {"scores": np.zeros((1, 1, VOCABULARY), np.float32)}, INPUTS, OUTPUTS)
    with pytest.raises(ModelError, match="the logits of 5 tokens have shape"):
        metric(Windows(5)).result(run)


def test_a_model_of_fixed_length_takes_windows_of_that_length() -> None:
    fixed = (Port("ids", np.dtype(np.int64), (1, 10)),)
    assert metric(Windows(10))(successor(0.5, fixed)) == pytest.approx(-2, rel=1e-6)
    with pytest.raises(DataError, match="takes 10 tokens at once") as caught:
        metric(Windows(12))(successor(0.5, fixed))
    assert "window=10" in caught.value.fix


def test_streams_are_named_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "tokens.npz"
    np.savez(path, test=np.arange(40, dtype=np.uint16), other=np.arange(7), bytes_per_token=np.float32(3.5))
    source = parse_token_source(f"{path}:test,window=8,stride=4")
    assert (source.path, source.array, source.windows) == (path, "test", Windows(8, 4))
    stream = read_stream(source)
    assert stream.tokens.dtype == np.int64 and stream.tokens.tolist() == list(range(40))
    assert stream.bytes_per_token == 3.5
    with pytest.raises(DataError, match="several streams of tokens: 'test', 'other'"):
        read_stream(parse_token_source(str(path)))


def test_the_metric_of_a_file_changes_its_digest_with_it(tmp_path: Path) -> None:
    path = tmp_path / "tokens.npz"
    np.savez(path, test=np.arange(40) % VOCABULARY)
    spec = f"perplexity:{path},window=8"
    before = eval_digest(spec)
    assert load_eval(spec)(successor(0.5)) < 0
    np.savez(path, test=np.arange(41))
    assert eval_digest(spec) != before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("t.npz,widow=3", "did you mean 'window'"),
        ("t.npz,window", "is not NAME=VALUE"),
        ("t.npz,window=3,window=4", "stands there twice"),
        ("t.npz,window=-3", "is no number"),
        ("t.npz,window=0", "at least 1 is needed"),
        ("t.npz,window=3,stride=4", "leaves out tokens"),
        ("t.npz,stride=4,windows=2", "not both"),
        (",window=3", "names no file"),
    ],
)
def test_what_is_no_name_of_a_stream_is_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_token_source(text)
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("perplexity", "the perplexity of which tokens"),
        ("perplexity:", "the perplexity of which tokens"),
        ("perplexity:none.npz", "there is no file"),
        ("perplexity:none.txt", "there is no file"),
    ],
)
def test_a_metric_without_tokens_is_refused(spec: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_eval(spec)
