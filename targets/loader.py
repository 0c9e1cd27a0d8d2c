"""Finding, reading and checking target profiles: built-in ones by name, a user's own by path."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bitwright.compiler.errors import ProfileError, nearest
from bitwright.targets.checks import examine, validate
from bitwright.targets.extends import Source, is_file_name, resolve, sibling
from bitwright.targets.schema import FAMILIES, Profile
from bitwright.targets.schema_errors import Finding
from bitwright.targets.x86_cpu.detect import describe_host
from bitwright.targets.yaml_reader import Mapping, Scalar, parse, read_file

HOST = "host"
LARGEST_FILE = 1 << 20  # a page of text, and a line for every measured call of a model
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class ProfileSummary:
    """One line of ``bitwright targets list``."""

    name: str
    family: str
    description: str


@dataclass(frozen=True)
class Inspection:
    """What reading one profile gave.

    Attributes:
        profile: The profile, or None if there are findings.
        findings: Every broken rule that could be found, in file order of the phases.
    """

    profile: Profile | None
    findings: tuple[Finding, ...]


def builtin_files() -> dict[str, Path]:
    """Return every shipped profile (abstract ones too) by name."""
    files = (path for family in FAMILIES for path in (_HERE / family / "profiles").glob("*.yaml"))
    return {path.stem: path for path in sorted(files)}


def fragment_files() -> dict[str, Path]:
    """Return the shipped fragments by name: parts that profiles extend, no profiles themselves."""
    return {path.stem: path for path in sorted((_HERE / "fragments").glob("*.yaml"))}


def profile_names() -> tuple[str, ...]:
    """Return the names that :func:`load_profile` accepts, without reading the host."""
    concrete = [name for name, path in builtin_files().items() if not is_abstract(_read(path))]
    return tuple(sorted([*concrete, HOST]))


def list_profiles() -> list[ProfileSummary]:
    """Return the shipped profiles that can be compiled for; ``host`` only where this machine is supported."""
    found = []
    for name in profile_names():
        try:
            profile = load_profile(name)
        except ProfileError:
            if name != HOST:
                raise
            continue
        found.append(ProfileSummary(profile.name, profile.family, profile.description))
    return found


def load_profile(name_or_path: str | Path) -> Profile:
    """Read a profile, everything it extends, and check it.

    Args:
        name_or_path: A built-in name (``x86-avx2``, ``host``) or the path of a YAML file; a string is a
            path if it ends in ``.yaml`` or ``.yml`` or has a folder in it.

    Raises:
        ProfileError: With ``file:line:column``, the key, the rule and the nearest known name.
    """
    inspection = inspect_profile(name_or_path)
    if inspection.profile is None:
        raise inspection.findings[0].error()
    return inspection.profile


def inspect_profile(name_or_path: str | Path) -> Inspection:
    """Read a profile and return all broken rules instead of the first.

    Raises:
        ProfileError: The file cannot be merged (unreadable, no YAML, unknown ``extends``).
    """
    root = merged(name_or_path)
    if is_abstract(root):
        what = "an abstract profile is a part that other profiles extend, not a target"
        raise ProfileError(what, where=str(root.mark), fix=f"known: {', '.join(profile_names())}")
    entries = {k: v for k, v in root.entries.items() if k not in ("extends", "abstract")}
    root = Mapping(entries, root.key_marks, root.mark)
    profile, findings = validate(root)
    if profile is not None:
        findings = examine(profile, root)
    return Inspection(None if findings else profile, tuple(findings))


def merged(name_or_path: str | Path) -> Mapping:
    """Return the YAML of a profile with everything it extends merged in, unchecked.

    Raises:
        ProfileError: A file is missing, is no strict YAML, or extends something unknown or itself.
    """
    return resolve(_source(name_or_path), _find)


def is_abstract(root: Mapping) -> bool:
    """Tell whether a file says ``abstract: true``."""
    flag = root.entries.get("abstract")
    return isinstance(flag, Scalar) and flag.value is True


def _source(name_or_path: str | Path) -> Source:
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or is_file_name(text) or "/" in text or "\\" in text:
        return _user_file(Path(name_or_path))
    return _builtin(text)


def _user_file(path: Path) -> Source:
    return Source(path.name, path.parent, partial(read_file, path, str(path), limit=LARGEST_FILE))


def _builtin(name: str) -> Source:
    if name == HOST:
        return Source(HOST, None, lambda: parse(describe_host(), "detected-host.yaml"))
    files = builtin_files()
    if name not in files:
        known = [*(n for n in files if not n.endswith("-base")), HOST]
        msg = f"unknown target '{name}'"
        raise ProfileError(msg, fix=f"{nearest(name, known)} (a file ends in .yaml)")
    return Source(name, None, partial(_read, files[name]))


def _find(name: str, source: Source) -> Source:
    if is_file_name(name):
        return _user_file(sibling(name, source.folder, source.name))
    if name == HOST:
        return _builtin(name)
    files = builtin_files() | fragment_files()
    if name not in files:
        msg = f"unknown profile '{name}'"
        raise ProfileError(msg, fix=nearest(name, tuple(files)))
    return Source(name, None, partial(_read, files[name]))


def _read(path: Path) -> Mapping:
    return read_file(path, path.relative_to(_HERE.parent).as_posix())
