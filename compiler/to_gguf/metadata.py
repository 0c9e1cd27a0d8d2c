"""What a GGUF file says about a decoder, and decoders that its architectures have no words for."""

from __future__ import annotations

from collections.abc import Sequence

from bitwright.compiler.errors import ModelError
from bitwright.compiler.gguf.values import Typed, float32, uint32
from bitwright.compiler.llama.decoder import Decoder, HyperParameters
from bitwright.compiler.llama.tensors import ModelTensor
from bitwright.compiler.to_gguf.proof import MOST_TOKENS


def of_decoder(hyper: HyperParameters, context: int) -> dict[str, Typed]:
    """Return the keys of a decoder's architecture.

    Args:
        hyper: Sizes and constants.
        context: Longest sequence.
    """
    stem = f"{hyper.architecture}."
    return {
        f"{stem}vocab_size": uint32(hyper.vocabulary),
        f"{stem}context_length": uint32(context),
        f"{stem}embedding_length": uint32(hyper.width),
        f"{stem}block_count": uint32(hyper.layers),
        f"{stem}feed_forward_length": uint32(hyper.feed_forward),
        f"{stem}attention.head_count": uint32(hyper.heads),
        f"{stem}attention.head_count_kv": uint32(hyper.key_heads),
        f"{stem}attention.key_length": uint32(hyper.head_width),
        f"{stem}attention.value_length": uint32(hyper.head_width),
        f"{stem}attention.layer_norm_rms_epsilon": float32(hyper.epsilon),
        f"{stem}rope.dimension_count": uint32(hyper.head_width),
        f"{stem}rope.freq_base": float32(hyper.base),
    }


def check_expressible(decoder: Decoder, tensors: Sequence[ModelTensor], context: int) -> None:
    """Refuse what llama.cpp would compute otherwise, or not load.

    Args:
        decoder: What is to be written.
        tensors: Its tensors.
        context: Longest sequence of the file.

    Raises:
        ModelError: Attention has a window or may have one, or a decoder with norms of heads has biases or stretched
            positions.
    """
    hyper, where = decoder.hyper, f"output '{decoder.logits.name}'"
    if hyper.window is not None and hyper.window < context:
        msg = f"attention sees {hyper.window} positions, which a file of architecture {hyper.architecture} cannot say"
        raise ModelError(
            msg, where=where, fix=f"--context {hyper.window}: within its window nothing is hidden"
        )
    largest = max(layer.attention.sight.largest for layer in decoder.layers)
    if hyper.window is None and largest + 2 > MOST_TOKENS and largest < context:
        msg = (
            f"masks are computed with the number {largest}, which may limit what is seen; that it does not is proven "
            f"for {MOST_TOKENS} tokens"
        )
        raise ModelError(
            msg, where=where, fix=f"--context {min(largest, MOST_TOKENS)}, or export without such masks"
        )
    if not hyper.head_norms:
        return
    biased = next((t.name for t in tensors if t.role == "bias"), None)
    if biased is not None or hyper.factors is not None:
        what = "stretched positions" if biased is None else f"a bias ('{biased}')"
        msg = (
            f"normalized heads and {what}: llama.cpp's architecture {hyper.architecture} has no place for it"
        )
        raise ModelError(msg, where=where, fix="run the ONNX model, or compile it")
