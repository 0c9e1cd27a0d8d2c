"""Which tensor gets which type: llama.cpp's mixtures by name, or one type for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bitwright.compiler.errors import UsageError, nearest
from bitwright.compiler.gguf.types import (
    F16,
    F32,
    IQ4_NL,
    Q2_K,
    Q3_K,
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
    TensorType,
    fitting,
)
from bitwright.compiler.llama.decoder import HyperParameters
from bitwright.compiler.llama.tensors import ModelTensor, Role

# What the files of models of this many layers with shared value heads give to their values at least.
LAYERS_OF_70B = 80


@dataclass(frozen=True)
class Mixture:
    """A named choice of types.

    Attributes:
        name: As llama.cpp writes it.
        number: Of the file type in the metadata.
        usual: The type of what has no rule.
    """

    name: str
    number: int
    usual: TensorType


MIXTURES = {
    m.name: m
    for m in (
        Mixture("F32", 0, F32),
        Mixture("F16", 1, F16),
        Mixture("Q4_0", 2, Q4_0),
        Mixture("Q4_1", 3, Q4_1),
        Mixture("Q8_0", 7, Q8_0),
        Mixture("Q5_0", 8, Q5_0),
        Mixture("Q5_1", 9, Q5_1),
        Mixture("Q2_K", 10, Q2_K),
        Mixture("Q3_K_S", 11, Q3_K),
        Mixture("Q3_K_M", 12, Q3_K),
        Mixture("Q3_K_L", 13, Q3_K),
        Mixture("Q4_K_S", 14, Q4_K),
        Mixture("Q4_K_M", 15, Q4_K),
        Mixture("Q5_K_S", 16, Q5_K),
        Mixture("Q5_K_M", 17, Q5_K),
        Mixture("Q6_K", 18, Q6_K),
        Mixture("IQ4_NL", 25, IQ4_NL),
    )
}
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
# llama.cpp's number for files whose types follow no rule of its own.
GUESSED = 1024


def mixture(name: str) -> Mixture:
    """Return a mixture by its name, in any case.

    Raises:
        UsageError: There is none.
    """
    wanted = name.upper()
    found = MIXTURES.get(ALIASES.get(wanted, wanted))
    if found is None:
        msg = f"unknown type '{name}'"
        raise UsageError(msg, where="--type", fix=nearest(wanted, [*MIXTURES, *ALIASES]))
    return found


def assign(
    chosen: Mixture,
    tensors: Sequence[ModelTensor],
    hyper: HyperParameters,
    *,
    weighted: bool,
    pure: bool = False,
) -> dict[str, TensorType]:
    """Return the type of every tensor.

    Args:
        chosen: The mixture.
        tensors: All tensors of the file.
        hyper: The decoder's sizes.
        weighted: Importance from calibration is known, which llama.cpp's rules ask for.
        pure: Every matrix gets the usual type.

    Returns:
        Types by name: what llama.cpp assigns, rows that are too short for a type included.
    """
    tied = not any(t.role == "output" for t in tensors)
    found: dict[str, TensorType] = {}
    for tensor in tensors:
        if not tensor.is_matrix:
            found[tensor.name] = F32
            continue
        wanted = chosen.usual
        if wanted not in (F32, F16) and not pure:
            wanted = _ruled(chosen, tensor, hyper, tied=tied, weighted=weighted)
        found[tensor.name] = fitting(wanted, tensor.shape[1])
    return found


def fallbacks(types: Mapping[str, TensorType], tensors: Sequence[ModelTensor]) -> dict[int, list[str]]:
    """Return the matrices whose rows are no multiple of 256, by the length of their rows."""
    found: dict[int, list[str]] = {}
    for tensor in tensors:
        if tensor.is_matrix and tensor.shape[1] % 256 and types[tensor.name] not in (F32, F16):
            found.setdefault(tensor.shape[1], []).append(tensor.name)
    return found


def _more_bits(layer: int, layers: int) -> bool:
    """Tell whether a layer is in the first or last eighth, or every third one between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _ruled(
    chosen: Mixture, tensor: ModelTensor, hyper: HyperParameters, *, tied: bool, weighted: bool
) -> TensorType:
    """Return what llama.cpp (llama-quant.cpp, llama_tensor_get_type) gives to a tensor of this role."""
    role: Role = tensor.role
    if role == "output" or (role == "token_embd" and tied):
        return Q8_0 if chosen.usual is Q8_0 or not chosen.usual.fits(tensor.shape[1]) else Q6_K
    layer, layers = tensor.layer, hyper.layers
    match role:
        case "attn_v":
            return _values(chosen, layer, hyper)
        case "ffn_down":
            return _down(chosen, layer, layers, weighted=weighted)
        case "attn_output":
            return {"Q2_K": Q3_K, "Q3_K_M": Q4_K, "Q3_K_L": Q5_K}.get(chosen.name, chosen.usual)
        case _:
            return chosen.usual


def _values(chosen: Mixture, layer: int, hyper: HyperParameters) -> TensorType:
    shared = hyper.heads // hyper.key_heads
    found = chosen.usual
    match chosen.name:
        case "Q2_K":
            found = Q4_K if shared >= 4 else Q3_K
        case "Q3_K_M":
            found = Q5_K if layer < 2 else Q4_K
        case "Q3_K_L":
            found = Q5_K
        case "Q4_K_M" | "Q5_K_M" if _more_bits(layer, hyper.layers):
            found = Q6_K
        case "Q4_K_S" if layer < 4:
            found = Q5_K
        case "IQ4_NL" if shared >= 4:
            found = Q5_K
    if hyper.layers == LAYERS_OF_70B and shared > 1 and found in (Q3_K, Q4_K):
        return Q5_K
    return found


def _down(chosen: Mixture, layer: int, layers: int, *, weighted: bool) -> TensorType:
    early = layer < layers // 8
    match chosen.name:
        case "Q2_K":
            return Q3_K
        case "Q3_K_M":
            return Q5_K if layer < layers // 16 else Q4_K
        case "Q3_K_L":
            return Q5_K
        case "Q4_K_M" | "Q5_K_M" if _more_bits(layer, layers):
            return Q6_K
        case "Q4_K_S" if early:
            return Q5_K
        case "IQ4_NL" if early and not weighted:
            return Q5_K
        case "Q4_0" if early and weighted:
            return Q4_1
        case "Q5_0" if early and weighted:
            return Q5_1
        case _:
            return chosen.usual
