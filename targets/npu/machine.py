"""A profile's systolic array as numbers: words of buffers, cycles of commands, and the texts that carry its size."""

from __future__ import annotations

from dataclasses import dataclass

from bitwright.compiler.errors import ProfileError
from bitwright.targets.schema import Profile
from bitwright.targets.sections.systolic import LARGEST_BUFFER_WORDS

MULTIPLIER_BITS = 16
LONGEST_SHIFT = 48  # of the requantization unit; products have 48 bits, so a longer one would leave 0, too
PARAMETER_BYTES = 7  # of a channel: bias, multiplier, shift
SUM_BYTES = 4


@dataclass(frozen=True)
class Machine:
    """The accelerator.

    Attributes:
        rows, columns: Size of the array.
        weight_stationary: Weights stay in the array; sums do otherwise.
        weight_bits: Width of weights.
        activation_words, weight_words, accumulator_words: Words of the buffers.
        clock_hz: Its clock.
    """

    rows: int
    columns: int
    weight_stationary: bool
    weight_bits: int
    activation_words: int
    weight_words: int
    accumulator_words: int
    clock_hz: float

    @property
    def macs_per_cycle(self) -> int:
        """Multiply-accumulates a cycle at peak."""
        return self.rows * self.columns

    @property
    def dataflow(self) -> str:
        """What stays in place, in words."""
        return "weight stationary" if self.weight_stationary else "output stationary"

    # The closed forms at the head of rtl/npu.v.
    def load_cycles(self, words: int) -> int:
        """Return the cycles of a load, to the next one."""
        return words + 1

    def tile_cycles(self, words: int, reload: bool) -> int:
        """Return the cycles of a tile of so many words of activations."""
        if self.weight_stationary:
            return (self.rows if reload else 0) + words + self.rows + self.columns + 1
        return words + 2 * self.rows + self.columns

    def store_cycles(self, rows: int) -> int:
        """Return the cycles of storing so many rows."""
        return rows + 6


def machine_of(profile: Profile) -> Machine:
    """Return the accelerator that a profile describes.

    Raises:
        ProfileError: A buffer is too small for the array, or too large for its addresses; the numerics are none that
            the requantization unit has; a compute row or a kernel contradicts the array.
    """
    array = profile.array
    assert array is not None
    words = {
        "activation_buffer_bytes": array.activation_buffer_bytes // array.rows,
        "weight_buffer_bytes": array.weight_buffer_bytes // array.columns,
        "accumulator_buffer_bytes": array.accumulator_buffer_bytes // (array.columns * SUM_BYTES),
    }
    for name, found in words.items():
        least = 2 * array.rows
        if not least <= found <= LARGEST_BUFFER_WORDS:
            what = f"{found} words; the array needs {least} at least and can address {LARGEST_BUFFER_WORDS}"
            raise ProfileError(what, where=f"array.{name}", fix="change the buffer's bytes")
    _check_numerics(profile)
    _check_kernels(profile)
    return Machine(
        array.rows,
        array.columns,
        array.dataflow == "weight_stationary",
        array.weight_bits,
        words["activation_buffer_bytes"],
        words["weight_buffer_bytes"],
        words["accumulator_buffer_bytes"],
        profile.clock_hz,
    )


def _check_numerics(profile: Profile) -> None:
    rule = profile.numerics.requantize
    known = rule.kind == "fixed_point" and rule.rounding == "half_up" and not rule.rounding_of
    if not known or rule.multiplier_bits != MULTIPLIER_BITS:
        what = "the requantization unit multiplies by 16 bits, adds half and shifts"
        fix = "write {kind: fixed_point, multiplier_bits: 16, rounding: half_up}"
        raise ProfileError(what, where="numerics.requantize", fix=fix)


def _check_kernels(profile: Profile) -> None:
    array = profile.array
    assert array is not None
    macs = array.rows * array.columns
    if any(row.acc == "s32" and row.macs_per_cycle != macs for row in profile.compute):
        what = f"the array makes {macs} multiply-accumulates a cycle, its compute row says otherwise"
        raise ProfileError(what, where="compute", fix=f"write 'macs_per_cycle: {macs}'")
    for op, rule in profile.runtimes.artifact.ops.items():
        for combo in rule.combos if rule.role == "anchor" else ():
            bits = 0 if combo.weight is None else profile.qspace(combo.weight).bits
            if bits > array.weight_bits:
                what = f"weights of format {combo.format} have {bits} bits, those of the array {array.weight_bits}"
                fix = f"list narrower formats only, or write 'array: {{weight_bits: {bits}}}'"
                raise ProfileError(what, where=f"runtimes.artifact.ops.{op}", fix=fix)


def size_header(machine: Machine) -> str:
    """Return the text of npu_size.h."""
    values = {
        "NPU_ROWS": machine.rows,
        "NPU_COLUMNS": machine.columns,
        "NPU_WEIGHT_STATIONARY": int(machine.weight_stationary),
        "NPU_ACTIVATION_WORDS": machine.activation_words,
        "NPU_WEIGHT_WORDS": machine.weight_words,
        "NPU_ACCUMULATOR_WORDS": machine.accumulator_words,
    }
    lines = [f"    {name} = {value}," for name, value in values.items()]
    return "\n".join(
        [
            "/* The accelerator's size, from the target's profile. */",
            "#ifndef NPU_SIZE_H",
            "#define NPU_SIZE_H",
            "",
            "enum {",
            *lines,
            "};",
            "",
            "#endif",
            "",
        ]
    )


def top_module(machine: Machine) -> str:
    """Return the text of npu_top.v: the accelerator with the profile's numbers."""
    parameters = {
        "ROWS": machine.rows,
        "COLUMNS": machine.columns,
        "WEIGHT_BITS": machine.weight_bits,
        "WEIGHT_STATIONARY": int(machine.weight_stationary),
        "ACTIVATION_WORDS": machine.activation_words,
        "WEIGHT_WORDS": machine.weight_words,
        "ACCUMULATOR_WORDS": machine.accumulator_words,
    }
    ports = _ports(machine)
    declared = ",\n".join(f"    {direction} {width}{name}" for direction, width, name in ports)
    given = ",\n".join(f"        .{name}({value})" for name, value in parameters.items())
    wired = ",\n".join(f"        .{name}({name})" for _, _, name in ports)
    head = f"// A {machine.rows}x{machine.columns} array, {machine.dataflow}; see npu.v for the meaning of the ports."
    return f"{head}\nmodule npu_top (\n{declared}\n);\n    npu #(\n{given}\n    ) npu (\n{wired}\n    );\nendmodule\n"


def _ports(machine: Machine) -> list[tuple[str, str, str]]:
    word = f"[{8 * max(machine.rows, machine.columns) - 1}:0] "
    numbers = ("address", "weight_address", "accumulator_address", "count", "rows")
    return [
        *(("input", "", name) for name in ("clk", "reset", "command_valid")),
        ("output", "", "command_ready"),
        ("input", "[2:0] ", "opcode"),
        *(("input", "[15:0] ", name) for name in numbers),
        *(("input", "", name) for name in ("accumulate", "reload", "slot")),
        *(("input", "signed [7:0] ", name) for name in ("zero_point", "lower", "upper")),
        ("input", "", "in_valid"),
        ("output", "", "in_ready"),
        ("input", word, "in_data"),
        ("output", "", "out_valid"),
        ("input", "", "out_ready"),
        ("output", f"[{8 * machine.columns - 1}:0] ", "out_data"),
        ("output", "", "idle"),
    ]
