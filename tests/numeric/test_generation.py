"""Generation in ONNX Runtime: a cache changes nothing but the time; text, stop tokens, comparison, command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from decoder_files import END, SIZES, tokens, write_decoder

import bitwright
from bitwright.compiler.cli.app import main
from bitwright.compiler.generation.opening import open_decoder

pytest.importorskip("tokenizers", reason="text needs the package tokenizers")
PROMPT = "The céntre"


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("cached"), "cache")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("plain"), "plain")


def all_logits(plain: Path, given: np.ndarray) -> np.ndarray:
    """Return the logits behind every token, computed in one call without a cache."""
    session = ort.InferenceSession(str(plain), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(["logits"], {"input_ids": given[None]})[0][0]
    return found


def test_a_cache_gives_the_logits_of_a_computation_from_scratch(cached: Path, plain: Path) -> None:
    given = tokens(30)
    expected = all_logits(plain, given)
    for path in (cached, plain):
        session = open_decoder(path, 1).session
        found = [session.feed(given[:7].tolist()), *(session.feed([int(t)]) for t in given[7:])]
        assert session.length == 30
        # Float32 sums in another order.
        np.testing.assert_allclose(found, expected[6:], atol=1e-5 * np.abs(expected).max())


def test_a_prompt_may_come_in_parts(cached: Path, plain: Path) -> None:
    given = tokens(20, seed=1)
    session = open_decoder(cached, 1).session
    session.feed(given[:3].tolist())
    session.restart()
    session.feed(given[:11].tolist())
    expected = all_logits(plain, given)[-1]
    found = session.feed(given[11:].tolist())
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_long_prompts_are_fed_in_pieces(cached: Path, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitwright.compiler.ort.decoding.PIECE", 7)
    given = tokens(30, seed=3)
    session = open_decoder(cached, 1).session
    expected = all_logits(plain, given)[-1]
    np.testing.assert_allclose(session.feed(given.tolist()), expected, atol=1e-5 * np.abs(expected).max())
    assert session.length == 30


def test_a_graph_of_single_tokens_is_fed_one_by_one(tmp_path: Path, cached: Path) -> None:
    model = onnx.load(cached)
    (dim,) = (i.type.tensor_type.shape.dim[1] for i in model.graph.input if i.name == "input_ids")
    dim.dim_value = 1
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1
    del model.graph.value_info[:]
    path = tmp_path / "single.onnx"
    onnx.save(model, path)
    prompt = tokens(9, seed=4).tolist()
    first, second = (bitwright.generate(p, tokens=prompt, max_tokens=5).tokens for p in (path, cached))
    assert first == second


def test_caches_of_half_precision(tmp_path: Path, plain: Path) -> None:
    given = tokens(20, seed=2)
    session = open_decoder(write_decoder(tmp_path, "cache", "float16"), 1).session
    found = [session.feed(given[:5].tolist()), *(session.feed([int(t)]) for t in given[5:])]
    expected = all_logits(plain, given)[4:]
    # Products of float16 have relative errors of 1e-3; a wrong position or cache changes logits by their own size.
    assert np.sqrt(np.mean((np.array(found) - expected) ** 2)) < 0.02 * np.sqrt(np.mean(expected**2))


def test_masks_and_positions_are_filled_in(tmp_path: Path) -> None:
    """The next token is a sum over the mask, the last position and all tokens: each of them must be right."""
    text = """
        <ir_version: 10, opset_import: ["": 21]>
        net (int64[N, T] input_ids, int64[N, S] attention_mask, int64[N, T] position_ids, float[N, 1, P, 1] old)
            => (float[N, T, 64] logits, float[N, 1, Q, 1] new) {
            axes = Constant<value = int64[2] {1, 3}>()
            last = Constant<value = int64[1] {-1}>()
            all = Constant<value = int64[3] {1, 2, 3}>()
            size = Constant<value = int64 {64}>()
            onoff = Constant<value = float[2] {0, 1}>()
            floats = Cast<to=1>(input_ids)
            rows = Unsqueeze(floats, axes)
            new = Concat<axis=2>(old, rows)
            sum = ReduceSum<keepdims=0>(new, all)
            tokens = Cast<to=7>(sum)
            seen = ReduceSum<keepdims=0>(attention_mask, last)
            both = Add(tokens, seen)
            column = Unsqueeze(both, last)
            total = Add(column, position_ids)
            next = Mod(total, size)
            logits = OneHot(next, size, onoff)
        }"""
    path = tmp_path / "model.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    tokens, seen = [3, 5, 2], 3
    for _ in range(10):
        tokens.append((sum(tokens) + seen + len(tokens) - 1) % 64)
        seen += 1
    assert bitwright.generate(path, tokens=[3, 5, 2], max_tokens=10).tokens == tuple(tokens[3:])


def test_both_forms_write_the_same(cached: Path, plain: Path) -> None:
    first, second = (bitwright.generate(path, PROMPT, max_tokens=24) for path in (cached, plain))
    assert first.tokens == second.tokens and first.text == second.text
    assert first.cached and not second.cached
    assert any("no cache" in note for note in second.notes)
    assert first.prompt == tuple(PROMPT.encode()) and first.steps == len(first.tokens) - (
        first.reason == "length"
    )


def test_greedy_tokens_are_the_most_probable_ones(cached: Path, plain: Path) -> None:
    found = bitwright.generate(cached, tokens=[5, 6, 7], max_tokens=12)
    given = np.array([*found.prompt, *found.tokens])
    assert all_logits(plain, given)[2:-1].argmax(-1).tolist() == list(found.tokens)


def test_pieces_are_the_text(cached: Path) -> None:
    pieces: list[str] = []
    found = bitwright.generate(cached, PROMPT, max_tokens=30, temperature=1.5, seed=4, told=pieces.append)
    assert "".join(pieces) == found.text
    written = bytes(t for t in found.tokens if t != END).decode(errors="replace")
    assert found.text == written


def test_seeds_decide_what_is_drawn(cached: Path) -> None:
    texts = [
        bitwright.generate(cached, tokens=[1], max_tokens=16, temperature=1.0, seed=seed).tokens
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("as_list", [True, False])
def test_a_stop_token_ends_the_text(tmp_path: Path, as_list: bool) -> None:
    path = write_decoder(tmp_path, end=None)
    free = bitwright.generate(path, tokens=[3, 4], max_tokens=8)
    assert free.reason == "length" and len(free.tokens) == 8
    stop = free.tokens[3]
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [stop] if as_list else stop})
    )
    found = bitwright.generate(path, tokens=[3, 4], max_tokens=8)
    assert found.reason == "stop token"
    assert found.tokens == free.tokens[: free.tokens.index(stop)]


def test_a_stop_token_may_be_named_by_its_text(tmp_path: Path) -> None:
    path = write_decoder(tmp_path, end=None)
    free = bitwright.generate(path, tokens=[3, 4], max_tokens=8)
    letter = next(t for t in free.tokens if 33 <= t < 127)
    config = {"eos_token": {"content": chr(letter)}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = bitwright.generate(path, tokens=[3, 4], max_tokens=8)
    assert found.tokens == free.tokens[: free.tokens.index(letter)]


def test_generation_ends_where_the_model_does(cached: Path) -> None:
    found = bitwright.generate(cached, tokens=[1, 2, 3], max_tokens=100)
    assert found.reason in ("context", "stop token")
    if found.reason == "context":
        # The last token is written, and never read.
        assert len(found.prompt) + len(found.tokens) == SIZES.positions + 1


def test_the_command_line_writes_the_text_and_nothing_else(
    cached: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(cached.parent), "--prompt", PROMPT, "--max-tokens", "9"]) == 0
    caught = capfd.readouterr()
    assert caught.out == f"{bitwright.generate(cached, PROMPT, max_tokens=9).text}\n"
    assert "Tokens/s" in caught.err


def test_the_command_line_gives_json(cached: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(cached), "--tokens", "1,2,3", "-n", "4", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["prompt"] == [1, 2, 3] and len(found["tokens"]) == found["steps"] + 1
    assert found["prompt_tokens_per_s"] > 0 and found["tokens_per_s"] > 0


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<answer>{% endif %}"
)


def test_a_message_is_put_into_the_models_template(tmp_path: Path) -> None:
    path = write_decoder(tmp_path)
    config = {"chat_template": TEMPLATE, "bos_token": {"content": "<end>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = bitwright.generate(path, "Why?", chat=True, system="Be brief", max_tokens=2)
    assert found.prompt == (END, *b"<system>Be brief</><user>Why?</><answer>")
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert bitwright.generate(path, "Why?", chat=True, max_tokens=2).prompt == tuple(b"Why?!")


def test_two_models_are_compared(tmp_path: Path, cached: Path, capfd: pytest.CaptureFixture[str]) -> None:
    other = write_decoder(tmp_path, seed=1)
    command = ["generate", str(cached), "--tokens", "1,2,3", "-n", "8", "--compare"]
    assert main([*command, str(other)]) == 0
    caught = capfd.readouterr()
    assert caught.out.startswith("the texts part at token ")
    assert main([*command, str(cached)]) == 0
    assert capfd.readouterr().out == "the same 8 tokens\n"
