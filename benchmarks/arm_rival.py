"""ONNX Runtime for aarch64 under qemu: fetched without root, run by an emulated CPython, its instructions counted."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from bitwright.compiler.ort.session import SessionConfig
from bitwright.targets.arm_cpu.counting import plugin, read_counts
from bitwright.targets.toolchain.process import run_tool
from bitwright.targets.toolchain.runtime_libraries import GLIBC_TAGS

SESSION = Path(__file__).with_name("arm_session.py")
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
SUITE = "bookworm"  # has CPython 3.11
INTERPRETER = (
    *(
        "python3.11-minimal",
        "libpython3.11-minimal",
        "libpython3.11-stdlib",
        "libc6",
        "libstdc++6",
        "libgcc-s1",
    ),
    *(
        "zlib1g",
        "libexpat1",
        "libssl3",
        "libffi8",
        "libbz2-1.0",
        "liblzma5",
        "libuuid1",
        "libcrypt1",
        "libtinfo6",
    ),
    *("libncursesw6", "libreadline8", "libsqlite3-0"),
)
WHEELS = ("onnxruntime", "numpy")
FETCH_S, RUN_S = 900.0, 3600.0
BASE = (
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp ssbs"
)


@dataclass(frozen=True)
class Cpu:
    """What the emulated process finds out about its processor: ONNX Runtime reads it from /proc/cpuinfo.

    Attributes:
        qemu: Value of qemu's ``-cpu``.
        part: Arm's part number.
        features: As Linux names them.
    """

    qemu: str
    part: str
    features: str

    def cpuinfo(self) -> str:
        """Return the content of /proc/cpuinfo."""
        lines = {
            "processor": "0",
            "BogoMIPS": "48.00",
            "Features": self.features,
            "CPU implementer": "0x41",
            "CPU architecture": "8",
            "CPU variant": "0x0",
            "CPU part": self.part,
            "CPU revision": "1",
        }
        return "".join(f"{name}\t: {value}\n" for name, value in lines.items()) + "\n"


CPUS = {
    "arm-cortex-a76": Cpu("cortex-a76", "0xd0b", BASE),
    "arm-neoverse-n2": Cpu(
        "max,sme=off,sve-max-vq=1",
        "0xd49",
        f"{BASE} jscvt fcma ilrcpc flagm dit uscat sve sve2 svei8mm svebf16 i8mm bf16",
    ),
}


def prepare(cache: Path) -> None:
    """Fetch interpreter and wheels into ``cache``, once: ``root`` and ``site``."""
    for name, fetch in (("site", _fetch_wheels), ("root", _fetch_interpreter)):
        if not (cache / name).exists():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as work:
                fetch(Path(work))
                (Path(work) / name).replace(cache / name)


def _fetch_wheels(work: Path) -> None:
    platforms = [f"--platform={tag}_aarch64" for tag in GLIBC_TAGS]
    wanted = [f"{name}=={version(name)}" for name in WHEELS]
    options = ["--only-binary=:all:", "--no-deps", "--implementation=cp", "--python-version=3.11", *platforms]
    command = [sys.executable, "-m", "pip", "download", "-q", *options, "-d", str(work / "wheels"), *wanted]
    run_tool(command, what="downloading wheels", timeout_s=FETCH_S)
    for wheel in (work / "wheels").glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(work / "site")


def _fetch_interpreter(work: Path) -> None:
    """Use apt with a state of its own, so that neither root nor a foreign architecture is needed."""
    folders = {"State::Lists": work / "lists", "Cache": work / "cache"}
    for folder in folders.values():
        (folder / "partial").mkdir(parents=True)
    (work / "cache/archives/partial").mkdir(parents=True)
    sources = work / "sources.list"
    sources.write_text(f"deb [signed-by={KEYRING}] http://deb.debian.org/debian {SUITE} main\n")
    lines = [f'Dir::{name} "{folder}";' for name, folder in folders.items()]
    lines += [
        'APT::Architecture "arm64";',
        'APT::Architectures { "arm64"; };',
        'Dir::State::status "/dev/null";',
    ]
    lines += [f'Dir::Etc::sourcelist "{sources}";', 'Dir::Etc::sourceparts "-";']
    (work / "apt.conf").write_text("\n".join(lines) + "\n")
    environment = {"APT_CONFIG": str(work / "apt.conf")}
    run_tool(["apt-get", "-q", "update"], what="apt-get update", timeout_s=FETCH_S, environment=environment)
    packages = work / "packages"
    packages.mkdir()
    script = 'cd "$1" && shift && exec apt-get -q download "$@"'
    command = ["sh", "-c", script, "sh", str(packages), *INTERPRETER]
    run_tool(command, what="downloading CPython", timeout_s=FETCH_S, environment=environment)
    for package in packages.glob("*.deb"):
        subprocess.run(["dpkg", "-x", str(package), str(work / "root")], check=True)


def count(
    cache: Path, cpu: Cpu, model: Path, inputs: Path, config: SessionConfig, inferences: int = 2
) -> float:
    """Return the instructions that one inference executes in ONNX Runtime on the emulated processor."""
    root = cache / "root"
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/cpuinfo").write_text(cpu.cpuinfo())
    emulator = shutil.which("qemu-aarch64")
    assert emulator, "qemu-user is not installed"
    variables = {"PYTHONHOME": f"{root}/usr", "PYTHONPATH": str(cache / "site"), "OPENBLAS_NUM_THREADS": "1"}
    environment = [word for name, value in variables.items() for word in ("-E", f"{name}={value}")]
    with tempfile.TemporaryDirectory() as work:
        counts, session = Path(work, "counts"), Path(work, "session.json")
        session.write_text(config.to_json())
        command = [
            emulator,
            "-cpu",
            cpu.qemu,
            "-plugin",
            f"{plugin()},out={counts}",
            "-L",
            str(root),
            *environment,
        ]
        command += [f"{root}/usr/bin/python3.11", str(SESSION), str(model), str(inputs), str(inferences)]
        command.append(str(session))
        run_tool(command, what=f"counting {model.name} in ONNX Runtime", timeout_s=RUN_S)
        marks = read_counts(counts).marks
    return ((marks[2] - marks[1]) - (marks[1] - marks[0])) / inferences
