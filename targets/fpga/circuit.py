"""A circuit in a folder: its files, and how tensors of the program become frames and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bitwright.compiler.program.ops import Program
from bitwright.targets.fpga.carried import carried
from bitwright.targets.fpga.network import Network
from bitwright.targets.fpga.verilog import axis_text, memory_texts, network_text, rtl_sources

IMAGE_RANK = 4
NETWORK_FILE = "network.v"
AXIS_FILE = "axis.v"
RTL_FOLDER = "rtl"


def write_circuit(network: Network, folder: Path, title: str) -> tuple[Path, ...]:
    """Write all files of a circuit.

    Args:
        network: The network.
        folder: Where they go.
        title: What it computes.

    Returns:
        The files, relative to ``folder``.
    """
    texts = {NETWORK_FILE: network_text(network, title), AXIS_FILE: axis_text(network)}
    texts |= {f"{RTL_FOLDER}/{name}": text for name, text in rtl_sources().items()}
    texts |= memory_texts(network)
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return tuple(map(Path, texts))


def to_frame(program: Program, name: str, values: np.ndarray) -> np.ndarray:
    """Return a tensor as its stream has it: signed, flat, channels last."""
    moved = values.transpose(0, 2, 3, 1) if values.ndim == IMAGE_RANK else values
    return (moved.astype(np.int64) - _offset(program, name)).astype(np.int64).reshape(-1)


def from_frame(program: Program, name: str, elements: np.ndarray) -> np.ndarray:
    """Return the tensor that a stream carried; the inverse of :func:`to_frame`.

    Accumulators, which leave where the program has float values, stay integers.
    """
    tensor = program.tensor(name)
    values = elements.astype(np.int64) + _offset(program, name)
    if len(tensor.shape) == IMAGE_RANK:
        batch, channels, height, width = tensor.shape
        values = values.reshape(batch, height, width, channels).transpose(0, 3, 1, 2)
    return values.reshape(tensor.shape).astype(tensor.dtype if tensor.quant is not None else np.int64)


def _offset(program: Program, name: str) -> int:
    """Return what was subtracted from a tensor's integers; accumulators travel as they are."""
    return 0 if program.tensor(name).quant is None else carried(program)[name].offset


def recorded(program: Program, aliases: Mapping[str, str], name: str, elements: np.ndarray) -> np.ndarray:
    """Return the tensor ``name`` that travelled under the name of its alias."""
    return from_frame(program, aliases.get(name, name), elements).reshape(program.tensor(name).shape)
