"""C++ kernels for the CPU: compiled once for this processor, then loaded from the user's cache.

Plain C functions called through ctypes, without torch's headers: the compiler needs seconds, no
ninja and no Python headers. The file name holds a digest of source, flags and processor, so that a
home directory shared by different machines serves each its own build.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
)


class NoCompilerError(RuntimeError):
    """The C++ kernels cannot be built here; the message says why."""


@functools.cache
def load_library(name: str, cache: Path) -> ctypes.CDLL:
    """Builds ``<name>.cpp``, which lies beside this file, unless ``cache`` has it; loads it.

    Import torch first: the library then shares its OpenMP threads and ``torch.set_num_threads``.

    Args:
        name: ``cpu_loss`` or ``cpu_histogram``.
        cache: Folder for the built libraries; made if missing.

    Raises:
        NoCompilerError: If there is no compiler, it fails, or the cache cannot be written.
    """
    source = Path(__file__).with_name(f"{name}.cpp")
    headers = sorted(source.parent.glob(f"{name}*.h"))
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NoCompilerError("no C++ compiler (c++, g++ or clang++) on PATH")
    compiler_version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=False
    ).stdout
    digest = hashlib.sha256()
    for file in (source, *headers):
        digest.update(file.read_bytes() + b"\0")
    for text in (*FLAGS, compiler_version, _processor()):
        digest.update(text.encode() + b"\0")
    library = cache / f"{name}-{digest.hexdigest()[:20]}.so"
    try:
        if not library.exists():
            cache.mkdir(parents=True, exist_ok=True)
            _compile(compiler, source, library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise NoCompilerError(f"cannot build or load {library}: {error}") from error


def _compile(compiler: str, source: Path, library: Path) -> None:
    # Built under another name and moved: a second process never loads half a file.
    handle, temporary = tempfile.mkstemp(dir=library.parent, suffix=".so")
    os.close(handle)
    try:
        done = subprocess.run(
            [compiler, *FLAGS, str(source), "-o", temporary],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line]
            raise NoCompilerError(f"{compiler} failed on {source.name}: {' '.join(lines[:1])}")
        Path(temporary).replace(library)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _processor() -> str:
    """Architecture and instruction sets: what -march=native depends on."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    flags = [line for line in text.splitlines() if line.startswith(("flags", "Features", "model"))]
    return platform.machine() + "\n".join(sorted(set(flags)))
