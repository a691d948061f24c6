"""Compile a C++ file once per machine and load it: the hot loops of a stage, without a build step at installation.

    load_native(source, flags) -> (library, "") or (None, why not)

The shared object lies in the user's cache, named by a hash of the source, the compiler and the CPU, so that an
upgrade or a move to another machine builds a new one. Called by `nn.kernels.cpu` and `package.kernels`; each has a
plain Python way to the same result, for machines without a compiler.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

OFF = "MOESTRO_CPU_KERNELS"
"""Environment variable: `off` keeps to plain torch and NumPy."""


def load_native(
    source: Path, flags: Sequence[str], link: Sequence[str] = (), depends: str = ""
) -> tuple[ctypes.CDLL | None, str]:
    """The compiled library and an empty reason, or None and why.

    flags     for the compiler
    link      further words for the linker
    depends   whatever else decides what comes out, for example the path of a library linked against
    """
    if os.environ.get(OFF) == "off":
        return None, f"{OFF} is off"
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler is None:
        return None, "no C++ compiler found; install g++ to get them"
    target = cache_folder() / f"{source.stem}-{_fingerprint(compiler, source, [*flags, *link, depends])}.so"
    if not target.exists():
        problem = _compile(compiler, source, flags, link, target)
        if problem:
            return None, problem
    try:
        return ctypes.CDLL(str(target)), ""
    except OSError as error:
        return None, f"{target} cannot be loaded ({error}); delete it"


def cache_folder() -> Path:
    """Where compiled code of this user lies."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "moestro"


def _fingerprint(compiler: str, source: Path, words: Sequence[str]) -> str:
    cpu = Path("/proc/cpuinfo")
    features = (
        next((line for line in cpu.read_text().splitlines() if line.startswith("flags")), "") if cpu.exists() else ""
    )
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    parts = [source.read_text(), *words, version, platform.machine(), features]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: str, source: Path, flags: Sequence[str], link: Sequence[str], target: Path) -> str:
    """Build `target` whole or not at all; returns what went wrong, or an empty string."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            compiled, linked = Path(folder, "native.o"), Path(folder, "native.so")
            for command in (
                [compiler, *flags, "-c", str(source), "-o", str(compiled)],
                [compiler, "-shared", str(compiled), *link, "-o", str(linked)],
            ):
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    first = done.stderr.strip().splitlines()[0] if done.stderr else done.returncode
                    return f"{compiler} failed: {first}"
            linked.replace(target)
    except OSError as error:
        return f"cannot build in {target.parent}: {error.strerror or error}"
    return ""
