"""One way to open and run a model in ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from bitwright.compiler.decoding.interface import MASK, first_hidden
from bitwright.compiler.decoding.ports import ModelRun, Port
from bitwright.compiler.errors import DataError, ModelError, ToolchainError
from bitwright.compiler.graph.saving import loadable
from bitwright.targets.schema import Runtime

ORT_ERRORS = (
    ort.capi.onnxruntime_pybind11_state.Fail,
    ort.capi.onnxruntime_pybind11_state.InvalidArgument,
    ort.capi.onnxruntime_pybind11_state.InvalidGraph,
    ort.capi.onnxruntime_pybind11_state.InvalidProtobuf,
    ort.capi.onnxruntime_pybind11_state.NotImplemented,
    ort.capi.onnxruntime_pybind11_state.RuntimeException,
)
CPU_PROVIDER = "CPUExecutionProvider"
ELEMENT_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(bool)": "bool",
    **{f"tensor({sign}int{bits})": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}
FATAL_ONLY = 4  # every error is raised as an exception; ONNX Runtime need not print it as well


@dataclass(frozen=True)
class SessionConfig:
    """What a session is opened with; the JSON form is the .session.json beside a model.

    Attributes:
        threads: ``intra_op_num_threads``; 0 leaves the choice to ONNX Runtime.
        optimize: Graph optimizations on (``ORT_ENABLE_ALL``) or off.
        session_config_entries: Key -> value.
        disabled_optimizers: Names of optimizers to leave out.
        provider: Execution provider.
        provider_options: Its options.
        arena: Whether a session keeps memory for its next run, which is faster. An array that a run returned keeps all
            of it, weights as kernels want them included, as long as it lives; without an arena it keeps itself only.
    """

    threads: int = 1
    optimize: bool = True
    session_config_entries: Mapping[str, str] | None = None
    disabled_optimizers: Sequence[str] = ()
    provider: str = CPU_PROVIDER
    provider_options: Mapping[str, str] | None = None
    arena: bool = True

    def to_json(self) -> str:
        """Return the text of a .session.json."""
        options = {"provider_options": [dict(self.provider_options)]} if self.provider_options else {}
        return json.dumps(
            {
                "providers": [self.provider],
                **options,
                "graph_optimization_level": "ORT_ENABLE_ALL" if self.optimize else "ORT_DISABLE_ALL",
                "session_config_entries": dict(self.session_config_entries or {}),
                "disabled_optimizers": list(self.disabled_optimizers),
            },
            indent=2,
        )


def config_for(runtime: Runtime, *, threads: int = 1) -> SessionConfig:
    """Return the session options that the profile's table wants."""
    return SessionConfig(
        threads=threads,
        optimize=runtime.optimize,
        session_config_entries=runtime.session_config,
        disabled_optimizers=runtime.disabled_optimizers,
        provider=runtime.execution_provider or CPU_PROVIDER,
        provider_options=runtime.provider_options,
    )


def runs_here(runtime: Runtime) -> bool:
    """Tell whether a runtime's models can be executed and timed on this machine: on its processor."""
    return runtime.execution_provider in (None, CPU_PROVIDER)


def local_config(runtime: Runtime, *, threads: int = 1) -> SessionConfig:
    """Return the session options that a runtime's models are executed with on this machine.

    Where the target's provider needs other hardware, the processor executes the model node by node, as the standard
    defines it: its results say what the numbers cost, its time says nothing.
    """
    if runs_here(runtime):
        return config_for(runtime, threads=threads)
    return SessionConfig(threads=threads, optimize=False)


def _options(
    config: SessionConfig, optimized_path: Path | None, profile_prefix: Path | None
) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = config.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = FATAL_ONLY
    options.enable_cpu_mem_arena = config.arena
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if config.optimize else level.ORT_DISABLE_ALL
    for key, value in (config.session_config_entries or {}).items():
        options.add_session_config_entry(key, value)
    if optimized_path is not None:
        options.optimized_model_filepath = str(optimized_path)
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_prefix)
    return options


def open_session(
    model: ir.Model | Path,
    config: SessionConfig | None = None,
    *,
    optimized_path: Path | None = None,
    profile_prefix: Path | None = None,
) -> ort.InferenceSession:
    """Open a model.

    Args:
        model: A model in memory or a file.
        config: Session options.
        optimized_path: Where ONNX Runtime shall write its optimized graph.
        profile_prefix: Record a profile, in a file whose name starts like this.

    Raises:
        ModelError: ONNX Runtime refuses the model.
    """
    config = config or SessionConfig()
    arguments = {
        "sess_options": _options(config, optimized_path, profile_prefix),
        "providers": [(config.provider, dict(config.provider_options or {}))],
        "disabled_optimizers": list(config.disabled_optimizers) or None,
    }
    _require_provider(config.provider)
    try:
        if isinstance(model, Path):
            session = ort.InferenceSession(str(model), **arguments)
        else:
            with loadable(model) as source:
                session = ort.InferenceSession(source, **arguments)
    except ORT_ERRORS as error:
        where = str(model) if isinstance(model, Path) else (model.graph.name or "model")
        msg = f"ONNX Runtime cannot load the model: {error}"
        raise ModelError(
            msg, where=where, fix="run it in ONNX Runtime first; only models it executes can be compiled"
        ) from error
    if config.provider not in session.get_providers():
        raise _no_provider(config.provider)
    return session


def _require_provider(provider: str) -> None:
    if provider not in ort.get_available_providers():
        raise _no_provider(provider)


def _no_provider(provider: str) -> ToolchainError:
    """ONNX Runtime would log a warning and compute on the processor."""
    what = f"ONNX Runtime cannot use {provider} on this machine"
    fix = "install onnxruntime-gpu, its CUDA libraries and a driver, or run the model where they are"
    return ToolchainError(what, fix=fix)


def run(session: ort.InferenceSession, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a session and return its outputs by name; feeds that are neither inputs nor their defaults are left out.

    Raises:
        DataError: The model fails on these inputs.
    """
    names = [o.name for o in session.get_outputs()]
    wanted = {i.name for i in (*session.get_inputs(), *session.get_overridable_initializers())}
    try:
        values = session.run(names, {k: v for k, v in feeds.items() if k in wanted})
    except ORT_ERRORS as error:
        what = f"the model fails on a sample in ONNX Runtime: {error}"
        raise DataError(
            what, fix="pass samples that the model accepts; run it in ONNX Runtime first"
        ) from error
    return dict(zip(names, values, strict=True))


def callable_model(session: ort.InferenceSession) -> ModelRun:
    """Return a session as a function of its inputs, with what it takes and gives."""
    inputs, outputs = (tuple(map(_port, of)) for of in (session.get_inputs(), session.get_outputs()))
    masked = any(port.name == MASK for port in inputs)

    def call(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if not masked and MASK in feeds and first_hidden(np.asarray(feeds[MASK])) is not None:
            what = f"the model takes no '{MASK}', so it would compute padded positions as if they were none"
            raise DataError(what, where=f"input '{MASK}'", fix="give it sequences without padding")
        return run(session, feeds)

    return ModelRun(call, inputs, outputs)


def _port(argument: ort.NodeArg) -> Port:
    name = ELEMENT_TYPES.get(argument.type)
    dims = tuple(d if isinstance(d, int) else (d or None) for d in argument.shape)
    return Port(argument.name, None if name is None else np.dtype(name), dims)
