"""Counting what an artifact executes: instructions and code blocks of one inference."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from bitwright.compiler.errors import ToolchainError
from bitwright.targets.arm_cpu import emulated
from bitwright.targets.schema import Profile
from bitwright.targets.toolchain.instruction_counter import INSTRUCTION_BYTES as INSTRUCTION_BYTES
from bitwright.targets.toolchain.instruction_counter import Block as Block
from bitwright.targets.toolchain.instruction_counter import Count as Count
from bitwright.targets.toolchain.instruction_counter import plugin as plugin
from bitwright.targets.toolchain.instruction_counter import read_counts as read_counts
from bitwright.targets.toolchain.linker import is_native
from bitwright.targets.toolchain.runner import Launch, execute

INFERENCES = 2


def why_not_countable(profile: Profile) -> str | None:
    """Return why nothing can be counted for ``profile`` on this machine, or None if it can."""
    if is_native(profile.toolchain.triple):
        return "instructions are counted in an emulator, and this machine runs the code itself"
    reason = emulated.why_not_executable(profile)
    if reason is None:
        try:
            plugin()
        except ToolchainError as error:
            return error.message
    return reason


def counted(launch: Launch, file: Path, *, blocks: bool = False) -> Launch:
    """Return ``launch`` with the plug-in, which writes to ``file``; one thread, because others would wait in loops.

    Raises:
        ToolchainError: The plug-in cannot be compiled.
    """
    emulator, *rest = launch.prefix
    options = f"{plugin()},out={file}" + (",blocks=on" if blocks else "")
    environment = {**launch.environment, "TVM_NUM_THREADS": "1"}
    return replace(launch, prefix=(emulator, "-plugin", options, *rest), environment=environment)


def count_run(
    bundle: Path, feeds: Mapping[str, np.ndarray], profile: Profile, *, inferences: int, blocks: bool = False
) -> Count:
    """Count a whole process that loads an artifact and executes it ``1 + inferences`` times.

    Raises:
        ToolchainError: The artifact cannot be executed here, or the plug-in not be compiled.
        DataError: ``feeds`` does not fit the model.
    """
    reason = why_not_countable(profile)
    if reason:
        raise ToolchainError(reason, where=f"counting instructions for {profile.name}")
    with tempfile.TemporaryDirectory(prefix="bitwright-count-") as work:
        file = Path(work, "counts")
        launch = counted(emulated.launch(profile), file, blocks=blocks)
        execute(bundle, feeds, launch, trace=False, repeat=inferences)
        return read_counts(file)


def count_inference(
    bundle: Path,
    feeds: Mapping[str, np.ndarray],
    profile: Profile,
    *,
    inferences: int = INFERENCES,
    blocks: bool = False,
) -> Count:
    """Count one inference: the difference of a run of ``2 * inferences`` and one of ``inferences``.

    Raises:
        ToolchainError: The artifact cannot be executed here, or the plug-in not be compiled.
        DataError: ``feeds`` does not fit the model.
    """
    few, many = (
        count_run(bundle, feeds, profile, inferences=times * inferences, blocks=blocks) for times in (1, 2)
    )
    return difference(few, many, inferences)


def difference(few: Count, many: Count, inferences: int) -> Count:
    """Return what one of the ``inferences`` that ``many`` has more than ``few`` executed."""
    executed = {
        block: (times - few.blocks.get(block, 0)) / inferences
        for block, times in many.blocks.items()
        if times > few.blocks.get(block, 0)
    }
    return Count((many.instructions - few.instructions) / inferences, executed)
