"""Checks of a merged profile: the schema, then what it cannot say; every finding has a place and a fix."""

from __future__ import annotations

from collections.abc import Iterator

from bitwright.compiler.errors import nearest
from bitwright.targets.extends import NUMBER_SECTIONS, OPTIONAL_NUMBER_SECTIONS
from bitwright.targets.schema import (
    COMPILED_FAMILIES,
    GENERATED_CODE,
    GENERATED_TOOLS,
    SHORT_FORMATS,
    Combo,
    ComputeRow,
    OpRule,
    Profile,
    QSpace,
    Runtime,
)
from bitwright.targets.schema_errors import Finding, Path, place, plain, validated
from bitwright.targets.yaml_reader import Mapping

PROVENANCE_KEYS = (
    *NUMBER_SECTIONS,
    *OPTIONAL_NUMBER_SECTIONS,
    "runtimes",
    "cores",
    "codegen",
    "limits",
    "budgets",
    "gpu",
    "fpga",
    "vela",
    "array",
)
DEFAULT_PROVENANCE = {"source": "default of the profile schema", "confidence": "estimate"}

CUDA_PROVIDER = "CUDAExecutionProvider"
_RANGES = {
    "s2": (-2, 1),
    "u2": (0, 3),
    "s3": (-4, 3),
    "u3": (0, 7),
    "s4": (-8, 7),
    "u4": (0, 15),
    "s5": (-16, 15),
    "u5": (0, 31),
    "s6": (-32, 31),
    "u6": (0, 63),
    "s8": (-128, 127),
    "u8": (0, 255),
    "s16": (-32768, 32767),
    "u16": (0, 65535),
    # Codebooks whose values are integers.
    "ternary": (-1, 1),
    "binary": (-1, 1),
}
_ACCUMULATOR_BITS = {"s16": 16, "s32": 32, "s48": 48, "s64": 64}


def validate(root: Mapping) -> tuple[Profile | None, list[Finding]]:
    """Return the profile, or None and every rule of the schema that is broken."""
    data = plain(root)
    sources = data.get("provenance")
    if isinstance(sources, dict):
        for section in NUMBER_SECTIONS:
            if section not in data:
                sources[section] = DEFAULT_PROVENANCE
    return validated(Profile, root, data)


def element_type(space: QSpace) -> str:
    """Return the scalar type of a qspace's values, e.g. ``u8``."""
    if space.codebook in ("e4m3", "e5m2"):
        return f"f8{space.codebook}"
    return space.float_type or space.codebook or f"{'s' if space.signed else 'u'}{space.bits}"


def holds(row_type: str, stored: str) -> bool:
    """Tell whether an operand of ``row_type`` holds every value of type ``stored`` (widening is exact)."""
    if row_type not in _RANGES or stored not in _RANGES:
        return row_type == stored
    (low, high), (least, most) = _RANGES[row_type], _RANGES[stored]
    return low <= least and most <= high


def most_magnitude(space: QSpace) -> int:
    """Return the largest ``|q - zero point|``; an asymmetric zero point may be at either end."""
    low, high = _RANGES[element_type(space)]
    if not space.symmetric:
        return high - low
    return high if space.narrow else (high - low + 1) // 2


def longest_reduction(act: QSpace, weight: QSpace, accumulator: str) -> int:
    """Return the most products that fit the accumulator in the worst case."""
    limit: int = 2 ** (_ACCUMULATOR_BITS[accumulator] - 1) - 1
    return limit // (most_magnitude(act) * most_magnitude(weight))


def examine(profile: Profile, root: Mapping) -> list[Finding]:
    """Return every contradiction inside a profile that keeps the schema."""
    broken = [
        *_provenance(profile),
        *_rows(profile),
        *_memory(profile),
        *_energy(profile),
        *_spaces(profile),
        *_family(profile),
        *_runtime("artifact", profile.runtimes.artifact, profile),
        *_runtime("onnxruntime", profile.runtimes.onnxruntime, profile),
    ]
    return [Finding(place(root, path), what, fix) for path, what, fix in broken]


Broken = tuple[Path, str, str]

# Section -> the family that has it.
OWN_SECTIONS = {"gpu": "nvidia_gpu", "fpga": "fpga", "vela": "ethos_u", "array": "npu"}


def _family(profile: Profile) -> Iterator[Broken]:
    for section, family in OWN_SECTIONS.items():
        given = getattr(profile, section) is not None
        if given and profile.family != family:
            yield (section,), f"the family {profile.family} has no section '{section}'", "remove it"
        if not given and profile.family == family:
            yield (
                (),
                f"a profile of the family {family} needs the section '{section}'",
                f"add {section}: {{...}}",
            )
    if profile.family in COMPILED_FAMILIES:
        for section, default in (("codegen", GENERATED_CODE), ("toolchain", GENERATED_TOOLS)):
            if getattr(profile, section) == default:
                what = f"a profile of the family {profile.family} needs the section '{section}'"
                yield (), what, f"add {section}: {{...}}"


def _provenance(profile: Profile) -> Iterator[Broken]:
    for key in profile.provenance:
        if key not in PROVENANCE_KEYS:
            yield ("provenance", key), f"'{key}' is not a section", nearest(key, PROVENANCE_KEYS)


def _rows(profile: Profile) -> Iterator[Broken]:
    sections = {"compute": [r.name for r in profile.compute], "memory": [r.name for r in profile.memory]}
    for section, names in sections.items():
        for index, name in enumerate(names):
            if name in names[:index]:
                yield (section, index), f"two rows are named '{name}'", "rename or remove one"


def _memory(profile: Profile) -> Iterator[Broken]:
    for index, (near, far) in enumerate(zip(profile.memory, profile.memory[1:], strict=False), start=1):
        if far.size_bytes <= near.size_bytes:
            what = f"'{far.name}' is listed behind '{near.name}' but is not larger"
            yield ("memory", index, "size_bytes"), what, "list memory nearest (smallest) first"


def _energy(profile: Profile) -> Iterator[Broken]:
    if profile.energy is None:
        return
    sections = {
        "pj_per_mac": (profile.energy.pj_per_mac, [r.name for r in profile.compute], "compute row"),
        "pj_per_byte": (profile.energy.pj_per_byte, [r.name for r in profile.memory], "memory level"),
    }
    for key, (given, known, what) in sections.items():
        for name in given:
            if name not in known:
                yield ("energy", key, name), f"unknown {what} '{name}'", nearest(name, known)


def _spaces(profile: Profile) -> Iterator[Broken]:
    for name, space in profile.qspaces.items():
        grouped = space.granularity == "group"
        if grouped != bool(space.groups):
            fix = "write 'groups: [32]'" if grouped else "write 'granularity: group', or remove 'groups'"
            yield ("qspaces", name), "granularity 'group' and 'groups' go together", fix
        if space.bits == 1 and space.codebook != "binary":
            yield ("qspaces", name, "bits"), "one bit needs the codebook binary", "write 'codebook: binary'"
        if space.stored_bits is not None and space.stored_bits < space.bits:
            what = f"{space.bits}-bit values do not fit elements of {space.stored_bits} bits"
            yield ("qspaces", name, "stored_bits"), what, f"write 'stored_bits: {space.bits}' or remove it"


def _runtime(name: str, runtime: Runtime, profile: Profile) -> Iterator[Broken]:
    base: Path = ("runtimes", name)
    yield from _refused(base, runtime, profile)
    if name == "onnxruntime" and runtime.execution_provider is None:
        yield base, "missing key 'execution_provider'", "write 'execution_provider: CPUExecutionProvider'"
    for index, chain in enumerate(runtime.fusions):
        if not chain or chain[0] not in runtime.ops:
            first = chain[0] if chain else ""
            yield (
                (*base, "fusions", index),
                f"the chain starts with '{first}', which is not in ops",
                (nearest(first, tuple(runtime.ops))),
            )
    for op, rule in runtime.ops.items():
        formats = [combo.format for combo in rule.combos]
        for index, combo in enumerate(rule.combos):
            if combo.format in formats[:index]:
                what = f"two kernels have the format '{combo.format}'"
                yield (*base, "ops", op, "combos", index), what, "remove the slower one"
            path = (*base, "ops", op, "combos", index)
            names = list(_unknown_names(combo, path, profile))
            yield from names
            if not names:
                yield from _combo(rule, combo, path, profile)


def _refused(base: Path, runtime: Runtime, profile: Profile) -> Iterator[Broken]:
    """Yield kernels that the runtime is slower with than without."""
    cuda = runtime.execution_provider == CUDA_PROVIDER
    for op, rule in runtime.ops.items():
        for index, combo in enumerate(rule.combos):
            path = (*base, "ops", op, "combos", index)
            if combo.format in runtime.refused:
                why = runtime.refused[combo.format]
                yield (
                    path,
                    f"a kernel of the refused format '{combo.format}' ({why})",
                    "remove one of the two",
                )
            space = profile.qspaces.get(combo.act)
            if cuda and space is not None and space.calibrated:
                what = (
                    f"{CUDA_PROVIDER} has no kernels for 8-bit activations: conversions around float products"
                )
                yield path, what, "use TensorrtExecutionProvider, or the format fp16"


def _unknown_names(combo: Combo, path: Path, profile: Profile) -> Iterator[Broken]:
    spaces = tuple(profile.qspaces)
    rows = tuple(row.name for row in profile.compute)
    used: list[tuple[Path, str]] = [((*path, "act"), combo.act)]
    if combo.weight is not None:
        used.append(((*path, "weight"), combo.weight))
    used += [((*path, "out", i), name) for i, name in enumerate(combo.out)]
    yield from ((p, f"unknown qspace '{n}'", nearest(n, spaces)) for p, n in used if n not in spaces)
    for index, name in enumerate(combo.intrinsics):
        if name not in rows:
            yield (*path, "intrinsics", index), f"unknown compute row '{name}'", nearest(name, rows)


def _combo(rule: OpRule, combo: Combo, path: Path, profile: Profile) -> Iterator[Broken]:
    weighted = rule.role in ("anchor", "table")
    if weighted != (combo.weight is not None):
        article = "an" if rule.role == "anchor" else "a"
        fix = "name the qspace of the weight" if weighted else "remove 'weight', or make it an anchor"
        yield path, f"{article} {rule.role} has {'a' if weighted else 'no'} weight", fix
        return
    if rule.role == "carrier" and combo.out != (combo.act,):
        yield (*path, "out"), "a carrier writes what it reads", f"write 'out: [{combo.act}]'"
    if combo.weight is None or rule.role == "table":
        return
    act, weight = profile.qspace(combo.act), profile.qspace(combo.weight)
    if act.float_type or weight.float_type or act.codebook or not _integers(weight):
        yield from _float_combo(combo, act, weight, path)
        return
    rows = [profile.compute_row(name) for name in combo.intrinsics]
    for index, row in enumerate(rows):
        yield from _row(row, act, weight, (*path, "intrinsics", index))
    if combo.accumulator == "f32":
        return
    most = min(
        [longest_reduction(act, weight, r.acc) for r in rows if r.acc in _ACCUMULATOR_BITS]
        or [longest_reduction(act, weight, combo.accumulator)]
    )
    if profile.limits.max_reduction > most:
        allowed = profile.limits.max_reduction
        what = f"{allowed} products can overflow the accumulator; the most that fit are {most}"
        yield (*path, "act"), what, f"write 'limits: {{max_reduction: {most}}}' or a smaller number"


def _integers(space: QSpace) -> bool:
    """Tell whether a weight's values are integers; those of a codebook may be, too."""
    return space.codebook is None or space.codebook in _RANGES


def _float_combo(combo: Combo, act: QSpace, weight: QSpace, path: Path) -> Iterator[Broken]:
    if act.float_type == "f32" and weight.float_type == "f32":
        yield path, "an anchor's weight must be narrower than float32", "leave float operators out of ops"
    if combo.format in ("int8", "int8-dynamic", "int8-row", "w8a16", *SHORT_FORMATS):
        what = f"format '{combo.format}' multiplies integers"
        yield (*path, "format"), what, "name the format of a weight-only kernel, or an integer act and weight"


def _row(row: ComputeRow, act: QSpace, weight: QSpace, path: Path) -> Iterator[Broken]:
    stored = element_type(act), element_type(weight)
    if not (holds(row.act, stored[0]) and holds(row.weight, stored[1])):
        what = f"'{row.name}' multiplies {row.act} by {row.weight} and cannot take {stored[0]} by {stored[1]}"
        yield path, what, "name a compute row for these types, or change the qspaces"
    if row.saturates and 2 * _RANGES[stored[0]][1] * most_magnitude(weight) > 2**15 - 1:
        what = f"'{row.name}' adds two products in 16 bits and saturates with {stored[1]} weights"
        yield path, what, "use a row that accumulates exactly; the numerics contract has no saturation"
