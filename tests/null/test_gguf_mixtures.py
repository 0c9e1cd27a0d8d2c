"""Mixtures: every tensor's type is what llama.cpp gives it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bitwright.compiler.errors import UsageError
from bitwright.compiler.gguf.types import F16
from bitwright.compiler.llama.decoder import HyperParameters
from bitwright.compiler.llama.tensors import ModelTensor, Role
from bitwright.compiler.to_gguf.mixtures import MIXTURES, assign, fallbacks, mixture

# Types by role and layer in files that llama.cpp itself (llama_model_quantize of 0.3.36's llama.cpp) quantized.
GOLDEN = json.loads((Path(__file__).parents[1] / "golden/gguf_mixtures.json").read_text())
SHAPES = {
    "16u": (16, 256, 8, 2, 256, False),
    "16t": (16, 256, 4, 2, 512, True),
    "8s": (8, 96, 4, 4, 256, False),
}
PER_LAYER: tuple[Role, ...] = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def nothing() -> np.ndarray:
    raise AssertionError("types do not depend on weights")


def decoder(
    layers: int, width: int, heads: int, key_heads: int, feed_forward: int, tied: bool
) -> tuple[list[ModelTensor], HyperParameters]:
    """Return the tensors of a decoder of these sizes, without weights."""
    hyper = HyperParameters(64, layers, width, feed_forward, heads, key_heads, width // heads, 32, 1e4, 1e-5)
    found = [ModelTensor("token_embd.weight", "token_embd", -1, (64, width), nothing)]
    for n in range(layers):
        found.append(ModelTensor(f"blk.{n}.attn_norm.weight", "norm", n, (width,), nothing))
        for role in PER_LAYER:
            columns = feed_forward if role == "ffn_down" else width
            found.append(ModelTensor(f"blk.{n}.{role}.weight", role, n, (64, columns), nothing))
    if not tied:
        found.append(ModelTensor("output.weight", "output", -1, (64, width), nothing))
    return found, hyper


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MIXTURES)
def test_types_are_llama_cpps(name: str, shape: str) -> None:
    tensors, hyper = decoder(*SHAPES[shape])
    types = assign(MIXTURES[name], tensors, hyper, weighted=False)
    for role, expected in GOLDEN[shape][name].items():
        found = [types[t.name].name for t in tensors if t.role == role]
        wanted = expected.split() if " " in expected else [expected] * len(found)
        assert found == wanted, role
    assert {types[t.name].name for t in tensors if t.role == "norm"} == {"F32"}


def test_the_golden_types_cover_all_mixtures() -> None:
    assert set(GOLDEN) == set(SHAPES)
    assert all(set(found) == set(MIXTURES) for found in GOLDEN.values())
    assert len({json.dumps(found) for found in GOLDEN["16t"].values()}) == len(MIXTURES)


def test_importance_changes_the_rules_as_in_llama_cpp() -> None:
    tensors, hyper = decoder(16, 256, 4, 2, 512, True)
    for name, plain, weighted in (
        ("Q4_0", "Q4_0", "Q4_1"),
        ("Q5_0", "Q5_0", "Q5_1"),
        ("IQ4_NL", "Q5_K", "IQ4_NL"),
    ):
        for known, expected in ((False, plain), (True, weighted)):
            types = assign(mixture(name), tensors, hyper, weighted=known)
            assert types["blk.1.ffn_down.weight"].name == expected
            assert types["blk.2.ffn_down.weight"].name == name


def test_pure_files_have_one_type() -> None:
    tensors, hyper = decoder(16, 256, 4, 2, 512, False)
    types = assign(mixture("q4_k_m"), tensors, hyper, weighted=True, pure=True)
    assert {types[t.name].name for t in tensors if t.is_matrix} == {"Q4_K"}


def test_values_of_the_largest_models_get_more_bits() -> None:
    tensors, hyper = decoder(80, 256, 8, 1, 256, False)
    types = assign(mixture("Q4_K_S"), tensors, hyper, weighted=False)
    assert types["blk.40.attn_v.weight"].name == "Q5_K"


def test_what_is_stored_in_blocks_of_32_is_said() -> None:
    tensors, hyper = decoder(8, 96, 4, 4, 256, True)
    types = assign(mixture("Q4_K_M"), tensors, hyper, weighted=False)
    assert {columns: len(names) for columns, names in fallbacks(types, tensors).items()} == {96: 49}
    assert fallbacks(dict.fromkeys(types, F16), tensors) == {}


def test_names_are_found_in_any_case_and_errors_name_the_nearest() -> None:
    assert mixture("q4_K_M").name == "Q4_K_M" and mixture("q5_k").name == "Q5_K_M"
    with pytest.raises(UsageError, match="Q4_K_M"):
        mixture("q4_km")
