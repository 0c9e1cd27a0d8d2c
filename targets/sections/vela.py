"""What the compiler of Arm's Ethos-U accelerators has to be told."""

from __future__ import annotations

from typing import Literal

from bitwright.targets.sections.record import Strict


class Vela(Strict):
    """Options of ``vela``.

    Attributes:
        accelerator: Name and size of the accelerator, e.g. ``ethos-u55-128``.
        config: Configuration file, one that Vela ships or a path.
        system: ``system-config`` in that file.
        memory_mode: ``memory-mode`` in that file.
        optimise: What Vela optimises for.
        cpu_operators: Whether operators that the accelerator cannot compute may stay on the processor beside it.
    """

    accelerator: str
    config: str
    system: str
    memory_mode: str
    optimise: Literal["Performance", "Size"] = "Performance"
    cpu_operators: Literal["refused", "allowed"] = "refused"
