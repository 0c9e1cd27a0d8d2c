"""What the runner must know about a compiled library: inputs, outputs and which kernels a trace records."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.compiler.errors import DataError, UsageError
from bitwright.targets.toolchain.shape_rules import MAIN

INTERFACE_FILE = "interface.json"
ROLES_FILE = "roles.txt"
ANY_SIZE = -1


@dataclass(frozen=True)
class Port:
    """One input or output of the model.

    Attributes:
        name: Its name in the ONNX model.
        dtype: numpy name.
        shape: Size of each axis, ``ANY_SIZE`` where the function takes any.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Interface:
    """The library's calling convention.

    Attributes:
        inputs: In the order of ``main``'s parameters.
        outputs: In the order of its results.
        roles: Kernel name -> how many of its leading arguments are activations; its last one is its output.
        function: The library's function.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    roles: Mapping[str, int]
    function: str = MAIN

    def write(self, folder: Path) -> None:
        """Write ``interface.json`` and ``roles.txt`` into the library's folder."""
        content: dict[str, Any] = {"function": self.function}
        content |= {"inputs": [asdict(p) for p in self.inputs], "outputs": [asdict(p) for p in self.outputs]}
        (folder / INTERFACE_FILE).write_text(json.dumps(content, indent=1) + "\n")
        (folder / ROLES_FILE).write_text("".join(f"{name} {count}\n" for name, count in self.roles.items()))

    @classmethod
    def read(cls, folder: Path) -> Interface:
        """Read what :meth:`write` wrote.

        Raises:
            UsageError: A file is missing or damaged.
        """
        try:
            ports = json.loads((folder / INTERFACE_FILE).read_text())
            lines = (folder / ROLES_FILE).read_text().splitlines()
            roles = {name: int(count) for name, count in (line.split() for line in lines)}
            function = str(ports.get("function", MAIN))
            return cls(_ports(ports["inputs"]), _ports(ports["outputs"]), roles, function)
        except (OSError, ValueError, KeyError, TypeError) as error:
            msg = f"the library's interface cannot be read: {error}"
            raise UsageError(msg, where=str(folder)) from error

    def arrange(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Return the arrays in the order of the inputs.

        Raises:
            DataError: A name, shape or element type does not fit.
        """
        unknown = sorted(set(feeds) - {p.name for p in self.inputs})
        if unknown:
            known = ", ".join(p.name for p in self.inputs)
            msg = f"the model has no input '{unknown[0]}'"
            raise DataError(msg, fix=f"its inputs are: {known}")
        return [_fitting(port, feeds) for port in self.inputs]


def _ports(records: Sequence[Mapping[str, Any]]) -> tuple[Port, ...]:
    return tuple(Port(r["name"], r["dtype"], tuple(int(d) for d in r["shape"])) for r in records)


def _fitting(port: Port, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    where = f"input '{port.name}'"
    if port.name not in feeds:
        msg = "no array was given"
        raise DataError(msg, where=where)
    array = np.asarray(feeds[port.name])
    if array.dtype.name != port.dtype:
        msg = f"expected {port.dtype}, got {array.dtype.name}"
        raise DataError(msg, where=where)
    free = array.ndim == len(port.shape) and all(
        wanted in (size, ANY_SIZE) for wanted, size in zip(port.shape, array.shape, strict=True)
    )
    if not free:
        msg = f"expected shape {list(port.shape)}, got {list(array.shape)}"
        raise DataError(msg, where=where)
    return np.array(array, dtype=array.dtype.newbyteorder("<"), order="C", ndmin=0)
