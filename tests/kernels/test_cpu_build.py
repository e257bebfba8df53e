import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mimic_fast.kernels import cpu_build
from mimic_fast.kernels.cpu_build import NoCompilerError, load_library

SOURCE = '#include "adder_step.h"\nextern "C" int add_step(int x) { return x + STEP; }\n'
# Two processes at once: each builds, waits until the other compiles too, and calls the result.
BUILD = """
import sys
from pathlib import Path
from mimic_fast.kernels import cpu_build
cpu_build.__file__ = sys.argv[1]
print(cpu_build.load_library("adder", Path(sys.argv[2])).add_step(1))
"""


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one small kernel, which load_library takes for its own."""
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "adder.cpp").write_text(SOURCE, encoding="ascii")
    (folder / "adder_step.h").write_text("#define STEP 2\n", encoding="ascii")
    monkeypatch.setattr(cpu_build, "__file__", str(folder / "cpu_build.py"))
    load_library.cache_clear()
    return folder


def compiler(folder: Path, script: str) -> str:
    """A PATH whose first compiler is a shell script."""
    folder.mkdir()
    (folder / "c++").write_text(f"#!/bin/sh\n{script}\n", encoding="ascii")
    (folder / "c++").chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_a_library_is_built_once_and_then_loaded(kernels, tmp_path, monkeypatch):
    path = compiler(tmp_path / "bin", f'echo "$@" >> {tmp_path}/calls; exec {real_compiler()} "$@"')
    monkeypatch.setenv("PATH", path)
    cache = tmp_path / "made" / "cache"

    results = []
    for _ in range(2):
        load_library.cache_clear()
        results.append(load_library("adder", cache).add_step(40))

    assert results == [42, 42]
    assert [file.suffix for file in cache.iterdir()] == [".so"]
    builds = [line for line in (tmp_path / "calls").read_text().splitlines() if "adder.cpp" in line]
    assert len(builds) == 1


def test_another_source_header_or_flag_is_another_library(kernels, tmp_path, monkeypatch):
    load_library("adder", tmp_path)
    changes = [
        lambda: (kernels / "adder_step.h").write_text("#define STEP 3\n", encoding="ascii"),
        lambda: (kernels / "adder.cpp").write_text(SOURCE + "// more\n", encoding="ascii"),
        lambda: monkeypatch.setattr(cpu_build, "FLAGS", (*cpu_build.FLAGS, "-O0")),
    ]

    for number, change in enumerate(changes, start=2):
        change()
        load_library.cache_clear()

        assert load_library("adder", tmp_path).add_step(0) == 3
        assert len(list(tmp_path.glob("adder-*.so"))) == number


def test_two_processes_may_build_at_once(kernels, tmp_path):
    # Each compiler waits until both have been called: neither finds the other's library.
    meet = f"touch {tmp_path}/$$.called; while [ $(ls {tmp_path}/*.called | wc -l) -lt 2 ]; do"
    script = (
        f'case "$*" in *adder.cpp*) {meet} sleep 0.05; done;; esac; exec {real_compiler()} "$@"'
    )
    environment = {**os.environ, "PATH": compiler(tmp_path / "bin", script)}
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", BUILD, str(kernels / "cpu_build.py"), str(cache)]

    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]

    assert [process.communicate(timeout=60)[0].strip() for process in processes] == ["3", "3"]
    assert [file.suffix for file in cache.iterdir()] == [".so"]
    assert ctypes.CDLL(str(next(cache.iterdir()))).add_step(5) == 7


def test_no_compiler_is_named_as_the_reason(kernels, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(NoCompilerError, match=r"no C\+\+ compiler \(c\+\+, g\+\+ or clang\+\+\)"):
        load_library("adder", tmp_path / "cache")

    assert not (tmp_path / "cache").exists()


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing_behind(kernels, tmp_path, monkeypatch):
    script = 'echo "adder.cpp:1: warning: x" >&2; echo "adder.cpp:2: error: no such" >&2; exit 1'
    monkeypatch.setenv("PATH", compiler(tmp_path / "bin", script))

    with pytest.raises(
        NoCompilerError, match=r"failed on adder\.cpp: adder\.cpp:2: error: no such"
    ):
        load_library("adder", tmp_path / "cache")

    assert list((tmp_path / "cache").iterdir()) == []


def test_a_compiler_that_is_killed_leaves_nothing_behind(kernels, tmp_path, monkeypatch):
    script = 'case "$*" in *adder.cpp*) kill -9 $$;; esac; echo 1.0'
    monkeypatch.setenv("PATH", compiler(tmp_path / "bin", script))

    with pytest.raises(NoCompilerError, match=r"failed on adder\.cpp"):
        load_library("adder", tmp_path / "cache")

    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(kernels, tmp_path):
    (tmp_path / "file").write_text("in the way", encoding="ascii")

    with pytest.raises(NoCompilerError, match=r"cannot build or load .*/file/cache/adder-"):
        load_library("adder", tmp_path / "file" / "cache")


def test_a_broken_library_in_the_cache_is_named(kernels, tmp_path):
    # Built by another process: this one would not open a path that it has open already.
    command = [sys.executable, "-c", BUILD, str(kernels / "cpu_build.py"), str(tmp_path)]
    subprocess.run(command, check=True, timeout=60)
    (library,) = tmp_path.glob("adder-*.so")
    library.write_bytes(b"half a file")

    with pytest.raises(NoCompilerError, match=r"cannot build or load .*/adder-"):
        load_library("adder", tmp_path)


def real_compiler() -> str:
    found = shutil.which("c++")
    assert found is not None
    return found
