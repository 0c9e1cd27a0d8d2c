"""A workload scheduled and tensorized: its loops in a tiling's order, every stage a command of the accelerator."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.s_tir import Schedule

from bitwright.targets.npu import intrinsics
from bitwright.targets.npu.onchip import with_addresses
from bitwright.targets.npu.tiling import Fetch
from bitwright.targets.npu.workload import Workload

Loop = Any


def scheduled(workload: Workload) -> tirx.PrimFunc:
    """Return the function of (x, weights, parameters, y) that gives the accelerator's commands.

    Raises:
        tvm.s_tir.ScheduleError: The workload is not what the intrinsics compute; a bug of ours.
    """
    schedule = Schedule(workload.function())
    for name, scope in zip(("activations", "weights", "sums"), intrinsics.SCOPES, strict=True):
        schedule.set_scope(schedule.get_sblock(name), 0, scope)
    loops = _blocked(schedule, workload)
    _place(schedule, workload, loops)
    _tensorize(schedule, workload, loops["depth"])
    return with_addresses(schedule.mod["main"], workload.machine, workload.tiling)


def _blocked(schedule: Schedule, workload: Workload) -> dict[str, Loop]:
    """Cut the loops of the sums into blocks; return the loops that things are placed at."""
    t, stationary = workload.tiling, workload.machine.weight_stationary
    block = schedule.get_sblock("sums")
    if stationary:
        group, outputs, pixels, column, depth, lane = schedule.get_loops(block)
    else:
        group, pixels, outputs, lane, column, depth = schedule.get_loops(block)
    pixels_out, pixels_in = schedule.split(pixels, [None, t.pixels], preserve_unit_iters=True)
    outputs_out, outputs_in = schedule.split(outputs, [None, t.outputs], preserve_unit_iters=True)
    depth_out, depth_in = schedule.split(depth, [None, t.depth], preserve_unit_iters=True)
    outer, inner = (pixels_out, outputs_out) if t.pixels_outer else (outputs_out, pixels_out)
    tile = (
        (depth_in, outputs_in, pixels_in, column, lane)
        if stationary
        else (pixels_in, outputs_in, lane, column, depth_in)
    )
    schedule.reorder(group, outer, inner, depth_out, *tile)
    return {"group": group, "strip": outer, "inner": inner, "block": depth_out, "depth": depth_out}


def _place(schedule: Schedule, workload: Workload, loops: dict[str, Loop]) -> None:
    """Put every stage where its operand is fetched, activations before weights."""
    t = workload.tiling
    schedule.reverse_compute_at(schedule.get_sblock("tiles"), loops["inner"], preserve_unit_loops=True)
    placed: tuple[tuple[str, Fetch], ...] = (("activations", t.activations), ("weights", t.weights))
    for name, fetch in placed:
        schedule.compute_at(schedule.get_sblock(name), loops[fetch], preserve_unit_loops=True)
        if name == "activations":
            schedule.compute_at(schedule.get_sblock("patches"), loops[fetch], preserve_unit_loops=True)


def _tensorize(schedule: Schedule, workload: Workload, depth: Loop) -> None:
    """Replace the inner loops of every stage by the accelerator's commands."""
    m, t = workload.machine, workload.tiling
    rows = t.pixels if m.weight_stationary else m.rows
    clear = schedule.decompose_reduction(schedule.get_sblock("sums"), depth)
    schedule.tensorize(schedule.get_loops(clear)[-2], intrinsics.clear(m, rows))
    update = schedule.get_loops(schedule.get_sblock("sums_update"))[-3]
    words = t.pixels if m.weight_stationary else t.depth
    schedule.tensorize(update, intrinsics.tile(m, words))
    for name, intrinsic in (
        ("activations", intrinsics.load_activations),
        ("weights", intrinsics.load_weights),
    ):
        *_, along, _ = schedule.get_loops(schedule.get_sblock(name))
        schedule.tensorize(along, intrinsic(m, int(schedule.get(along).extent)))
    _tensorize_store(schedule, workload, rows)


def _tensorize_store(schedule: Schedule, workload: Workload, rows: int) -> None:
    loops = schedule.get_loops(schedule.get_sblock("tiles"))
    if not workload.machine.weight_stationary:  # the same channels one after the other: their parameters stay
        pixels, outputs = loops[-4], loops[-3]
        schedule.reorder(outputs, pixels)
        loops = schedule.get_loops(schedule.get_sblock("tiles"))
    schedule.tensorize(loops[-2], intrinsics.store(workload.machine, rows, workload.output))
