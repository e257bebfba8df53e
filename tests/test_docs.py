"""What README.md and docs/ name exists: commands, settings, recipes, links, imports."""

import ast
import fnmatch
import functools
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main
from pydantic import BaseModel

from mimic_fast.attacks.kinds import attack_of
from mimic_fast.comparison.settings import MatrixSettings
from mimic_fast.config import Frozen, Settings
from mimic_fast.evaluation.attack_file import read_attack
from mimic_fast.launch.cli import app
from mimic_fast.recipe import PRESETS, load_recipe, load_settings

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.toml"))

_FENCE = re.compile(r"^[ ]*```(\w*)\n(.*?)^[ ]*```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FILE = re.compile(r"(?:mimic_fast|kernels|launch|benchmarks|docs|tests)/[\w./-]+")
_SETTING = re.compile(rf"(?:{'|'.join(Settings.model_fields)})\.[a-z][\w.]*")
_SUFFIXES = (".safetensors", ".json", ".jsonl", ".toml", ".png")


def fences(page: Path, *languages: str) -> Iterator[str]:
    """The code blocks of a page that are written in one of these languages."""
    for language, text in _FENCE.findall(page.read_text()):
        if language in languages:
            yield text


def command_lines(text: str) -> Iterator[list[str]]:
    """Arguments of every ``mimic-fast`` in shell text, torchrun's ``-m mimic_fast`` included."""
    for line in text.replace("\\\n", " ").splitlines():
        if not re.search(r"(^|\s)mimic-fast |-m mimic_fast ", line):
            continue
        words = shlex.split(line, comments=True)
        place = words.index("mimic-fast" if "mimic-fast" in words else "mimic_fast")
        arguments = words[place + 1 :]
        ends = [at for at, word in enumerate(arguments) if word in ("|", ">", "&&", ";")]
        yield arguments[: min(ends, default=len(arguments))]


def documented() -> list[Any]:
    """Every command line of the pages and of the recipes' headers, with where it stands."""
    texts = [(page.name, text) for page in PAGES for text in fences(page, "", "sh", "bash")]
    texts += [(recipe.name, header(recipe)) for recipe in RECIPES]
    return [
        pytest.param(arguments, id=f"{name}: {' '.join(arguments)}"[:90])
        for name, text in texts
        for arguments in command_lines(text)
    ]


def header(recipe: Path) -> str:
    """A recipe's comments without their marks; a command inside a sentence gets its own line."""
    lines = recipe.read_text().splitlines()
    text = "\n".join(line.lstrip("# ") for line in lines if line.startswith("#"))
    return text.replace("`", "\n")


def parsed(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """Name and parameters of a command line; the parser raises on what does not exist."""
    command: Any = typer.main.get_command(app)
    names, rest = [], list(arguments)
    while hasattr(command, "commands"):
        assert rest, f"mimic-fast {' '.join(arguments)} names no command"
        assert rest[0] in command.commands, f"mimic-fast has no command {rest[0]!r}"
        names.append(rest.pop(0))
        command = command.commands[names[-1]]
    return " ".join(names), command.make_context(names[-1], rest).params


def recipe_of(params: dict[str, Any]) -> Path | None:
    """The TOML file of a command line."""
    return params.get("recipe") or params.get("matrix")


def settings_model(command: str) -> type[Frozen]:
    if command.startswith("pretrain"):
        return importlib.import_module("mimic_fast.pretraining").PretrainSettings
    if command.startswith("attack "):
        return attack_of(command.removeprefix("attack "))[0]
    if command == "compare":
        return MatrixSettings
    return Settings


def has_setting(model: type[BaseModel], path: str) -> bool:
    """Whether a dotted name is a field, or lies inside one that takes any key."""
    name, _, rest = path.partition(".")
    if name not in model.model_fields:
        return False
    kind = model.model_fields[name].annotation
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return not rest or has_setting(kind, rest)
    return not rest or "dict[" in str(kind)


@pytest.mark.parametrize("arguments", documented())
def test_documented_command_line_parses_and_its_settings_are_valid(arguments):
    command, params = parsed(arguments)

    recipe = recipe_of(params)
    if recipe is not None and recipe.parent != Path():
        assert (ROOT / recipe).is_file()
    if command == "config validate" or "overrides" not in params:
        return
    source = None if recipe is None or not (ROOT / recipe).is_file() else ROOT / recipe
    overrides = params["overrides"] or ()
    model = settings_model(command)
    if model is Settings:
        load_settings(source, preset=params.get("preset"), overrides=overrides)
    elif source is not None:
        load_recipe(model, source, overrides=overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_named_in_text_exist(page):
    text = _FENCE.sub("", page.read_text())
    for code in _CODE.findall(text):
        for arguments in command_lines(code):
            command: Any = typer.main.get_command(app)
            rest = arguments
            while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
                assert rest[0] in command.commands, code
                command, rest = command.commands[rest[0]], rest[1:]
            options = {name for param in command.params for name in param.opts} | {"--help"}
            assert {word for word in rest if word.startswith("--")} <= options, code
        if re.fullmatch(r"--[a-z][a-z-]*( .*)?", code):
            assert code.split()[0] in all_options(), code


@functools.cache
def all_options() -> frozenset[str]:
    """Options of all commands together."""
    pending, found = [typer.main.get_command(app)], {"--help"}
    while pending:
        command = pending.pop()
        pending += getattr(command, "commands", {}).values()
        found |= {name for param in command.params for name in param.opts}
    return frozenset(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_named_in_text_exist(page):
    for code in _CODE.findall(_FENCE.sub("", page.read_text())):
        words = code.removeprefix("--set ").strip("'")
        name = re.split(r"[ =]", words)[0]
        if _SETTING.fullmatch(name) and not name.endswith(_SUFFIXES):
            assert has_setting(Settings, name), code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_of_settings_show_their_values(page):
    for column, path, cell in table_values(page):
        value: Any = load_settings(preset=None if column == "default" else column)
        for key in path.split("."):
            value = getattr(value, key)
        assert json.loads(cell) == (list(value) if isinstance(value, tuple) else value), path


def test_table_of_presets_names_every_difference():
    shown = {path for _, path, _ in table_values(ROOT / "docs" / "method.md")}

    flat = [dict(leaves(load_settings(preset=name).model_dump(mode="json"))) for name in PRESETS]
    differing = {path for path in flat[0] if len({str(values[path]) for values in flat}) > 1}
    assert shown == differing - {"preset"}


def table_values(page: Path) -> Iterator[tuple[str, str, str]]:
    """Column, setting, shown value of tables headed by ``setting`` and presets or default."""
    columns: list[str] = []
    for line in page.read_text().splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            columns = []
        elif cells[0] == "setting":
            columns = cells
        elif columns and not set(line) <= set("|- "):
            for column, cell in zip(columns[1:], cells[1:], strict=True):
                if column in {"default", *PRESETS}:
                    yield column, cells[0], cell


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text()
    for target in _LINK.findall(_FENCE.sub("", text)):
        name, _, anchor = target.partition("#")
        if "://" in name:
            continue
        path = page.parent / name if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target
    named = [word for text_ in fences(page, "", "sh", "bash") for word in text_.split()]
    for word in [*_CODE.findall(_FENCE.sub("", text)), *named]:
        if _FILE.fullmatch(word):
            assert (ROOT / word).exists(), word


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_recipe_is_valid_for_the_command_its_header_names(recipe):
    (arguments,) = command_lines(header(recipe))
    command, params = parsed(arguments)

    load_recipe(settings_model(command), recipe)
    if command == "demo":
        assert load_settings(recipe)
    else:
        assert ROOT / (recipe_of(params) or "") == recipe


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipes_shown_are_valid(page, tmp_path):
    for text in fences(page, "toml"):
        (tmp_path / "recipe.toml").write_text(text)
        if page.name == "compare.md":
            load_recipe(MatrixSettings, tmp_path / "recipe.toml")
        else:
            load_settings(tmp_path / "recipe.toml")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_shown_imports_what_exists(page):
    for text in fences(page, "python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mimic_fast"):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module}.{alias.name}"


def test_attack_file_shown_is_read(tmp_path):
    (text,) = fences(ROOT / "docs" / "usage.md", "json")
    (tmp_path / "attack.json").write_text(text)
    mask = np.zeros((1, 8, 8), np.float32)
    np.savez(tmp_path / "trigger.npz", mask=mask, pattern=mask.repeat(3, axis=0))

    attack = read_attack(tmp_path / "attack.json")

    assert attack.targets == json.loads(text)["targets"]


def test_make_targets_shown_exist():
    targets = set(re.findall(r"^(\w+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))

    shown = {
        target
        for page in PAGES
        for text in fences(page, "", "sh", "bash")
        for target in re.findall(r"^make (\w+)", text, re.MULTILINE)
    }
    assert shown
    assert shown <= targets


def test_tree_of_the_readme_is_the_real_one():
    tree = next(text for text in fences(ROOT / "README.md", "") if text.startswith("mimic_fast/"))
    shown, parent = set(), ""
    for line in tree.splitlines():
        names = line.strip().split("  ")[0].split(", ")
        parent = names[0] if not line.startswith(" ") else parent
        shown |= {f"{'' if parent == name else parent}{name}".rstrip("/") for name in names}

    assert all((ROOT / name).is_dir() for name in shown)
    ignored = [pattern.strip("/") for pattern in (ROOT / ".gitignore").read_text().split()]
    parents = (ROOT, ROOT / "mimic_fast", ROOT / "launch")
    folders = {
        path.relative_to(ROOT).as_posix()
        for parent in parents
        for path in parent.iterdir()
        if path.is_dir()
        and not path.name.startswith(".")
        and not any(fnmatch.fnmatch(path.name, pattern) for pattern in ignored)
    }
    assert folders <= shown
