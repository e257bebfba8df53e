"""The wheel that users install holds everything, and nothing that is not theirs."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy, so that no build folder is left in the checkout."""
    copy = tmp_path_factory.mktemp("source") / "mimic_fast"
    shutil.copytree(
        ROOT,
        copy,
        symlinks=True,
        ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "demo_run", "runs", "tests"),
    )
    out = tmp_path_factory.mktemp("wheel")
    # the backend of this environment: no network, no second copy of setuptools
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_wheel_holds_linked_folders_and_data_files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())

    expected = {
        f"mimic_fast/{path.relative_to(ROOT / 'mimic_fast')}"
        for folder in ("", "kernels", "launch")
        for path in (ROOT / "mimic_fast" / folder).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so")
    }
    assert expected <= names
    for name in (
        "mimic_fast/py.typed",
        "mimic_fast/kernels/reference.py",
        "mimic_fast/launch/cli.py",
        "mimic_fast/launch/commands/purify.py",
        "mimic_fast/report/report.html.j2",
    ):
        assert name in names
    assert any(name.startswith("mimic_fast/launch/recipes/") for name in names)
    assert any(name.startswith("mimic_fast/assets/") for name in names)


def test_wheel_holds_nothing_outside_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}

    assert {top for top in tops if not top.endswith(".dist-info")} == {"mimic_fast"}


def test_installed_wheel_runs_from_another_folder(wheel, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r});"
        "import mimic_fast.kernels.reference as r, mimic_fast.launch.cli as c;"
        "print(r.__file__); print(c.__file__); sys.exit(c.run(['--version']))"
    )

    done = subprocess.run(
        [sys.executable, "-I", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    kernels, cli, version = done.stdout.split("\n", 2)
    assert kernels.startswith(str(site))
    assert cli.startswith(str(site))
    assert version.startswith("mimic-fast ")


def test_constraints_pin_exactly_and_name_no_host():
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    ]

    assert lines
    for line in lines:
        requirement = line.partition(";")[0].strip()
        assert requirement.count("==") == 1, line
        assert not {"@", "/"} & set(line), line
