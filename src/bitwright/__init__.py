"""Bitwright: a hardware-aware quantizing compiler for ONNX models.

The functions mirror the command line's verbs::

    bundle = bitwright.compile("model.onnx", target="host", data="calibration.npz", output="out")
    outputs = bundle.run({"input": array})
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from bitwright.compiler.errors import (
    AccuracyGateError,
    BitwrightError,
    DataError,
    InfeasibleBudgetError,
    InternalError,
    ModelError,
    PerformanceGateError,
    ProfileError,
    ToolchainError,
    UsageError,
    VerificationError,
)

if TYPE_CHECKING:
    import numpy as np

    from bitwright.compiler.bundle.bundle import Bundle
    from bitwright.compiler.bundle.decoder import CompiledDecoder
    from bitwright.compiler.deploy import Deployment
    from bitwright.compiler.evaluation import Evaluation
    from bitwright.compiler.export_decoder import ExportedDecoder
    from bitwright.compiler.export_torch import Exported
    from bitwright.compiler.generation.generate import Generation
    from bitwright.compiler.inspect import Inspection
    from bitwright.compiler.options import Options
    from bitwright.compiler.to_gguf.export import Written
    from bitwright.compiler.training.train import Trained
    from bitwright.compiler.tune.outcome import Tuning

    Data: TypeAlias = str | Path | Mapping[str, np.ndarray] | Iterable[Mapping[str, np.ndarray]] | None

__version__ = "0.1.0"

__all__ = [
    "AccuracyGateError",
    "BitwrightError",
    "Bundle",
    "CompiledDecoder",
    "DataError",
    "Deployment",
    "InfeasibleBudgetError",
    "Inspection",
    "InternalError",
    "ModelError",
    "Options",
    "PerformanceGateError",
    "ProfileError",
    "ToolchainError",
    "UsageError",
    "VerificationError",
    "__version__",
    "compile",
    "evaluate",
    "export",
    "generate",
    "gguf",
    "inspect",
    "quantize",
    "train",
    "tune",
]

# Loaded when first asked for: they bring onnx and onnxruntime along, which take a second.
_LAZY = {
    "Bundle": "bitwright.compiler.bundle.bundle",
    "CompiledDecoder": "bitwright.compiler.bundle.decoder",
    "Deployment": "bitwright.compiler.deploy",
    "Inspection": "bitwright.compiler.inspect",
    "Options": "bitwright.compiler.options",
}


def __getattr__(name: str) -> Any:
    """Load a public class when it is first used."""
    if name not in _LAZY:
        msg = f"module 'bitwright' has no attribute '{name}'"
        raise AttributeError(msg)
    from importlib import import_module

    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the lazy names, too."""
    return sorted({*globals(), *__all__})


def compile(
    model: str | Path,
    *,
    target: str | Path,
    data: Data = None,
    output: str | Path,
    **options: Any,
) -> Bundle:
    """Compile a model for one target.

    Args:
        model: The ONNX file.
        target: A target's name or a profile's .yaml file.
        data: Calibration samples: an .npz, a folder of .npz files, ``FILE.py:FUNC``, arrays by input name whose
            leading axis counts the samples, or an iterable of samples.
        output: The folder to write.
        **options: Further fields of :class:`Options`, e.g. ``dims={"batch": 1}``, ``keep_float={"conv1"}``.

    Returns:
        The finished bundle.

    Raises:
        BitwrightError: See its subclasses; nothing is written then.
    """
    from bitwright.compiler.pipeline import compile_model

    if options.get("stop_after") is not None:
        what = "a stopped compilation has no bundle to return"
        raise UsageError(what, where="stop_after", fix="use the command line's --stop-after with --dump")
    bundle = compile_model(_options(model, target, data, output, options))
    assert bundle is not None, "only stop_after ends a compilation without a bundle"
    return bundle


def quantize(
    model: str | Path,
    *,
    target: str | Path,
    data: Data = None,
    output: str | Path,
    **options: Any,
) -> Deployment:
    """Quantize a model for ONNX Runtime: one Q/DQ file and its session options.

    Args:
        model: The ONNX file.
        target: A target's name or a profile's .yaml file.
        data: Calibration samples, as for :func:`compile`.
        output: The .onnx file to write.
        **options: Further fields of :class:`Options`, e.g. ``gate=False``.

    Returns:
        The paths of the written files and the report's content.

    Raises:
        BitwrightError: See its subclasses; nothing is written then.
    """
    from bitwright.compiler import deploy

    return deploy.quantize(_options(model, target, data, output, options))


def tune(
    model: str | Path,
    *,
    target: str | Path,
    data: Data = None,
    budget: str = "60s",
    **options: Any,
) -> Tuning:
    """Measure ways to compute a model's dot products, and remember the fastest for every compilation.

    Args:
        model: The ONNX file.
        target: A target's name or a profile's .yaml file.
        data: Calibration samples, as for :func:`compile`.
        budget: The most it may cost: ``"60s"``, ``"5m"`` or ``"200"`` (kernels measured).
        **options: Further fields of :class:`Options`, e.g. ``tuning_store=Path("records.jsonl")``.

    Returns:
        The kernel of every kind of work, and what it gains.

    Raises:
        BitwrightError: See its subclasses; what was measured stays in the store.
    """
    from bitwright.compiler.pipeline import tune_model

    return tune_model(_options(model, target, data, None, {**options, "tune": budget}))


def gguf(
    model: str | Path,
    *,
    output: str | Path,
    type: str = "Q4_K_M",
    data: str | Path | Mapping[str, np.ndarray] | None = None,
    bits: float | None = None,
    **options: Any,
) -> Written:
    """Write an ONNX decoder of the llama family as a GGUF file for llama.cpp.

    Args:
        model: The ONNX file.
        output: The .gguf file to write.
        type: A mixture of llama.cpp's, e.g. ``"Q4_K_M"``, ``"Q8_0"``, ``"F16"``.
        data: Calibration samples, as for :func:`compile`: what rounding errors cost.
        bits: Choose types for single tensors under so many bits for each weight instead; needs data.
        **options: Further fields of :class:`bitwright.compiler.to_gguf.export.Request`, e.g. ``tokenizer=Path(...)``.

    Returns:
        What was written: size, types and errors of all tensors, notes.

    Raises:
        BitwrightError: See its subclasses; nothing is written then.
    """
    from dataclasses import fields

    from bitwright.compiler.errors import nearest
    from bitwright.compiler.to_gguf.export import Request, export_gguf

    known = [field.name for field in fields(Request)]
    unknown = next((name for name in options if name not in known), None)
    if unknown is not None:
        what = "no such option"
        raise UsageError(what, where=unknown, fix=nearest(unknown, known))
    source = str(data) if isinstance(data, Path) else data
    request = Request(Path(model), Path(output), type, bits, source, **options)
    return export_gguf(request)


def export(
    source: str | Path,
    *,
    output: str | Path,
    opset: int | None = None,
    form: Literal["plain", "cache"] = "cache",
    dtype: Literal["float32", "float16"] = "float32",
    context: int | None = None,
) -> Exported | ExportedDecoder:
    """Write a PyTorch module or a Hugging Face folder of a decoder as an ONNX file.

    Args:
        source: ``MODULE.py:FACTORY``, or a folder with config.json and safetensors.
        output: The .onnx file to write.
        opset: Of a module, by default 21; folders have theirs.
        form: Of a folder: with a cache of keys and values, or without.
        dtype: Of a folder's weights and caches.
        context: Longest sequence of a folder's decoder; by default the checkpoint's.

    Returns:
        The file, and how far its results are from the source's.

    Raises:
        BitwrightError: See its subclasses; nothing is written then.
    """
    if Path(source).is_dir():
        from bitwright.compiler.export_decoder import export_folder

        if opset is not None:
            what = "only modules are exported in an opset of choice"
            raise UsageError(what, where="opset", fix="leave it out")
        return export_folder(Path(source), Path(output), form=form, dtype=dtype, context=context)
    from bitwright.compiler.export_torch import export as export_module

    return export_module(str(source), Path(output), opset=opset or 21)


def generate(
    model: str | Path,
    prompt: str | None = None,
    *,
    tokens: Iterable[int] | None = None,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    tokenizer: str | Path | None = None,
    threads: int = 1,
    chat: bool = False,
    system: str | None = None,
    told: Callable[[str], None] | None = None,
) -> Generation:
    """Let a decoder continue a text in ONNX Runtime.

    Args:
        model: The ONNX file, or the folder with it.
        prompt: Text to be continued.
        tokens: Token numbers to be continued instead; needs no tokenizer.
        max_tokens: Generate at most so many tokens.
        temperature: Logits are divided by it before drawing; 0 takes the most probable token.
        top_k: Draw from so many of the most probable tokens only.
        top_p: Draw from the fewest most probable tokens whose probabilities reach this sum.
        seed: Equal seeds draw equal tokens.
        tokenizer: tokenizer.json; None: the one beside the model.
        threads: Threads that compute.
        chat: The prompt is a message: it is put into the model's chat template.
        system: What the model is told before the message.
        told: Gets every piece of text as it comes.

    Returns:
        Tokens, text, why it ended, and how long it took.

    Raises:
        BitwrightError: See its subclasses.
    """
    from bitwright.compiler.decoding.sampling import Sampling
    from bitwright.compiler.generation.generate import Request
    from bitwright.compiler.generation.generate import generate as run_request

    numbers = None if tokens is None else tuple(int(token) for token in tokens)
    place = None if tokenizer is None else Path(tokenizer)
    sampling = Sampling(temperature, top_k, top_p, seed)
    request = Request(
        Path(model), prompt, numbers, place, max_tokens, sampling, threads, chat=chat, system=system
    )
    return run_request(request, told)


def evaluate(model: str | Path, metric: str, *, threads: int = 1) -> Evaluation:
    """Measure a metric of a model as it stands, in ONNX Runtime.

    Args:
        model: The ONNX file, or the folder with it.
        metric: ``perplexity:TOKENS.npz``, ``perplexity:TEXT.txt`` or ``FILE.py:FUNC``.
        threads: Threads that compute.

    Returns:
        The metric, higher is better, and for perplexity its parts.

    Raises:
        BitwrightError: See its subclasses.
    """
    from bitwright.compiler.evaluation import evaluate_model

    return evaluate_model(Path(model), metric, threads=threads)


def train(
    model: str | Path,
    *,
    target: str | Path,
    data: Data,
    output: str | Path,
    weights: int | Literal["ternary", "binary"] | None = None,
    activations: int | None = None,
    all_layers: bool = False,
    training: Mapping[str, Any] | None = None,
    **options: Any,
) -> Trained:
    """Train a model as it will be rounded (quantization-aware training); needs PyTorch.

    Args:
        model: The ONNX file.
        target: A target's name or a profile's .yaml file.
        data: Training samples, named as for :func:`compile`; the float model is what they are compared with.
        output: The Q/DQ .onnx file to write, which the other verbs take as it is.
        weights: Bits of the inner layers' weights, where fewer than the recipe's are wanted.
        activations: Bits of what these layers read.
        all_layers: The first and the last layer get fewer bits, too.
        training: Further fields of :class:`bitwright.compiler.training.request.Training`, e.g. ``{"epochs": 20}``.
        **options: Further fields of :class:`Options`, e.g. ``recipe="ternary"``.

    Returns:
        The paths of the written files, steps and losses.

    Raises:
        BitwrightError: See its subclasses; nothing but a checkpoint is written then.
    """
    from dataclasses import fields

    from bitwright.compiler.errors import nearest
    from bitwright.compiler.training.entry import train as run_training
    from bitwright.compiler.training.request import Precision, Training

    known = [field.name for field in fields(Training) if field.name != "precision"]
    unknown = next((name for name in training or {} if name not in known), None)
    if unknown is not None:
        what = "no such option of training"
        raise UsageError(what, where=unknown, fix=nearest(unknown, known))
    wanted = Training(Precision(weights, activations, all_layers), **(training or {}))
    return run_training(_options(model, target, data, output, options), wanted)


def inspect(
    model: str | Path,
    *,
    target: str | Path,
    dims: Mapping[str, int] | None = None,
    runtime: Literal["artifact", "onnxruntime"] = "artifact",
) -> Inspection:
    """Plan a model for a target without data.

    Args:
        model: The ONNX file.
        target: A target's name or a profile's .yaml file.
        dims: Sizes of dynamic dimensions; the batch is 1 unless named.
        runtime: Plan for the compiled artifact or for ONNX Runtime.

    Returns:
        Coverage, multiply-accumulates, sizes and estimated times.

    Raises:
        BitwrightError: The model or the profile is refused, or a size is missing.
    """
    from bitwright.compiler.inspect import inspect_model

    return inspect_model(model, target, dims=dims, runtime=runtime)


def _options(
    model: str | Path,
    target: str | Path,
    data: Data,
    output: str | Path | None,
    options: Mapping[str, Any],
) -> Options:
    from dataclasses import fields

    from bitwright.compiler.errors import nearest
    from bitwright.compiler.options import Options
    from bitwright.compiler.tune.budget import parse_budget

    known = [field.name for field in fields(Options)]
    unknown = [name for name in options if name not in known]
    if unknown:
        what = "no such option"
        raise UsageError(what, where=unknown[0], fix=nearest(unknown[0], known))
    extra = dict(options)
    if "keep_float" in extra:
        extra["keep_float"] = frozenset(extra["keep_float"])
    if isinstance(extra.get("tune"), str):
        extra["tune"] = parse_budget(extra["tune"])
    source = str(data) if isinstance(data, Path) else data
    place = None if output is None else Path(output)
    return Options(model=Path(model), target=str(target), data=source, output=place, **extra)
