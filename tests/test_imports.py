"""Who may import whom (CONTRIBUTING.md), read from the sources; and what an import costs."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import mimic_fast

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mimic_fast"

# From the bottom up: an area imports from its own layer and the ones below.
LAYERS = [
    {"version", "errors", "config", "recipe", "files", "progress"},
    {"kernels"},
    {"ops", "ops_choice", "ops_loss", "ops_histogram"},
    {
        "encoders",
        "losses",
        "layer_losses",
        "mutual_information",
        "data",
        "ops_views",
        "checkpoint",
        "training_state",
        "metrics_log",
        "distributed",
        "deepspeed_config",
        "engine_rules",
        "precision",
        "divergence",
        "step_clock",
        "performance",
        "trackers",
        "tracker_kinds",
        "diverged",
        "not_finite",
        "sharded_state",
        "saver",
        "engines",
        "accumulation",
        "training_log",
        "watch",
        "batchnorm",
        "byol",
        "optim",
        "step",
        "teacher_memory",
        "first_weights",
        "stopping",
    },
    {
        "planning",
        "doctor",
        "replaying",
        "training",
        "pretraining",
        "self_supervised",
        "distil",
        "after_passes",
        "evaluation",
        "report",
        "scan",
        "comparison",
        "attacks",
        "baselines",
        "evidence",
        "demo",
    },
    {"launch"},
]
LEVEL = {area: level for level, layer in enumerate(LAYERS) for area in layer}

# Libraries that only these files may import at all, and libraries too slow to import at the top.
ONLY = {
    "accelerate": {"distributed", "distil", "trackers", "tracker_kinds"},
    "triton": {"kernels", "ops_choice"},
    "nvidia": {"data"},
    "ffmpeg": {"data"},
    "av": {"data"},
    "datasets": {"data"},
    "pyarrow": {"data"},
    "deepspeed": {"engines"},
    "typer": {"launch"},
    "rich": {"launch"},
}
HEAVY = {
    "datasets",
    "pyarrow",
    "timm",
    "torchvision",
    "matplotlib",
    "accelerate",
    "transformers",
    "rich",
    "jinja2",
}


@dataclass(frozen=True)
class Import:
    file: Path
    line: int
    name: str
    at_top: bool
    for_types: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(PACKAGE)}:{self.line} imports {self.name}"


def sources() -> list[Path]:
    # up to Python 3.12 rglob follows no links, from 3.13 on it can: so name the two that there are
    tops = (PACKAGE, PACKAGE / "kernels", PACKAGE / "launch")
    return sorted({path for top in tops for path in top.rglob("*.py")})


def area(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path) -> list[Import]:
    found: list[Import] = []

    def visit(node: ast.AST, at_top: bool, for_types: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                found.extend(
                    Import(file, child.lineno, name, at_top, for_types) for name in names(child)
                )
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            types = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            visit(child, at_top and not is_function, for_types or types)

    visit(ast.parse(file.read_text(encoding="utf-8")), True, False)
    return found


def names(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif node.module == "mimic_fast":
        public = mimic_fast._PUBLIC
        yield from (public.get(alias.name, f"mimic_fast.{alias.name}") for alias in node.names)
    else:
        yield node.module or "."


ALL = [found for file in sources() for found in imports(file)]


def test_every_file_has_a_place_in_the_layers():
    unknown = {area(file) for file in sources()} - LEVEL.keys() - {"__init__", "__main__"}

    assert not unknown


def test_dependencies_point_downward():
    wrong = [
        str(found)
        for found in ALL
        if found.name.startswith("mimic_fast.")
        and area(found.file) in LEVEL
        and LEVEL.get(found.name.split(".")[1], 0) > LEVEL[area(found.file)]
    ]

    assert not wrong


def test_only_ops_imports_kernels():
    wrong = [
        str(found)
        for found in ALL
        if found.name.startswith("mimic_fast.kernels")
        and not area(found.file).startswith(("ops", "kernels"))
    ]

    assert not wrong


def test_kernels_import_torch_triton_and_themselves_only():
    allowed = sys.stdlib_module_names | {"torch", "triton", "jaxtyping"}
    wrong = [
        str(found)
        for found in ALL
        if area(found.file) == "kernels"
        and found.name.split(".")[0] not in allowed
        and not found.name.startswith("mimic_fast.kernels")
    ]

    assert not wrong


@pytest.mark.parametrize("library", ONLY)
def test_library_is_imported_only_where_it_belongs(library):
    wrong = [
        str(found)
        for found in ALL
        if found.name.split(".")[0] == library
        and area(found.file) not in ONLY[library]
        and not found.for_types
    ]

    assert not wrong


def test_heavy_libraries_are_imported_where_they_are_used():
    wrong = [
        str(found)
        for found in ALL
        if found.name.split(".")[0] in HEAVY and found.at_top and not found.for_types
    ]

    assert not wrong


def test_imports_are_absolute():
    assert not [str(found) for found in ALL if found.name == "."]


def test_library_code_neither_prints_nor_reads_the_environment():
    banned = {"os.environ", "os.getenv", "sys.argv", "print", "sys.exit"}
    wrong = [
        f"{file.relative_to(PACKAGE)}:{node.lineno} uses {text}"
        for file in sources()
        if area(file) not in ("launch", "__main__")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute | ast.Name)
        and (text := ast.unparse(node)) in banned
        # Launchers tell a process its place, and DeepSpeed its device, by no other way.
        and not (area(file) == "distributed" and text == "os.environ")
    ]

    assert not wrong


def test_kernels_are_no_package_of_their_own():
    # a top-level package 'kernels' would shadow the library of that name
    assert not (PACKAGE / "kernels" / "__init__.py").exists()
    assert (PACKAGE / "kernels").is_symlink()
    assert (PACKAGE / "launch").is_symlink()


def test_importing_the_package_and_the_command_line_imports_no_torch():
    code = (
        "import sys, json, mimic_fast, mimic_fast.config, mimic_fast.recipe, mimic_fast.files,"
        " mimic_fast.progress, mimic_fast.launch.cli, mimic_fast.launch.progress;"
        "print(json.dumps(sorted(sys.modules)))"
    )
    loaded = json.loads(
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    )

    assert not {"torch", "numpy", "timm", "torchvision", "matplotlib", "rich"} & set(loaded)


def test_purify_is_still_the_function_after_its_module_is_imported():
    import mimic_fast.distil
    import mimic_fast.mutual_information.locate
    import mimic_fast.pretraining

    assert callable(mimic_fast.purify)
    assert mimic_fast.purify is mimic_fast.distil.purify
    assert mimic_fast.pretrain is mimic_fast.pretraining.pretrain
    assert mimic_fast.locate is mimic_fast.mutual_information.locate.locate


def test_every_public_name_resolves_to_what_its_module_defines():
    for name in mimic_fast.__all__:
        value = getattr(mimic_fast, name)
        assert callable(value) or name == "__version__", name

    with pytest.raises(AttributeError, match="no attribute 'purifi'"):
        _ = mimic_fast.purifi
