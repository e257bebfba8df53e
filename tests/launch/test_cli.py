import json
import resource
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mimic_fast.attacks.kinds import KINDS
from mimic_fast.launch.cli import _machine_is_at_fault, app
from mimic_fast.launch.commands.config import Kind
from mimic_fast.version import VERSION


def test_help_takes_less_than_a_second_of_processor_time(program):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)

    done = program("--help")

    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.code == 0
    assert "purify" in done.out
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("purifi",), "Did you mean 'purify'?"),
        (("purify", "--techer", "x"), "--teacher"),
        (("attack",), "Missing command"),
        (("inspect",), "Missing argument"),
        (("purify", "--seed", "many"), "'--seed'"),
        (("purify", "nowhere.toml"), "nowhere.toml does not exist"),
        (("config", "show", "--set", "optim.learning_rat=1"), "unknown setting"),
        (("purify", "--set", "los.clone=1"), "unknown setting 'los'; did you mean 'loss"),
        (("purify", "--downstream", "cars"), "--downstream takes NAME=PATH, got 'cars'"),
        (("purify", "--preset", "fast"), "preset must be one of"),
        (("evaluate", "--encoder", "a=x", "--encoder", "a=y"), "two encoders are called 'a'"),
        (("evaluate", "--encoder", "x"), "--downstream"),
        (("evaluate",), "no encoder given"),
    ],
)
def test_wrong_command_line_is_one_line_and_exit_2(program, arguments, message):
    done = program(*arguments)

    assert done.code == 2
    assert message in done.error
    assert done.out == ""


def test_demo_replaces_only_an_earlier_demo(program, tmp_path):
    other = tmp_path / "work"
    other.mkdir()
    (other / "thesis.tex").write_text("years")

    done = program("demo", "--out", str(other))

    assert done.code == 2
    assert f"{other} holds files" in done.error
    assert (other / "thesis.tex").exists()


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_version_is_printed():
    assert invoke("--version") == f"mimic-fast {VERSION}\n"


def test_every_command_has_help():
    commands = [
        ["demo"],
        ["purify"],
        ["locate"],
        ["evaluate"],
        ["attack", "badencoder"],
        ["pretrain"],
        ["inspect"],
        ["frames"],
        ["bench", "loss"],
        ["bench", "mi"],
        ["config", "show"],
        ["config", "validate"],
        ["config", "schema"],
    ]
    for command in commands:
        assert f"mimic-fast {' '.join(command)}" in invoke(*command, "--help").replace(
            "root", "mimic-fast"
        )


def test_config_show_prints_effective_settings():
    shown = json.loads(invoke("config", "show", "--preset", "mimic", "--set", "optim.lr=0.5"))

    assert shown["preset"] == "mimic"
    assert shown["optim"]["lr"] == 0.5
    assert shown["run"]["keep"] == 2


@pytest.mark.parametrize("kind", ["purify", "pretrain", "badencoder"])
def test_config_schema_describes_the_settings(kind):
    schema = json.loads(invoke("config", "schema", "--for", kind))

    assert schema["properties"]["seed"]["description"]


def test_every_recipe_is_valid():
    recipes = sorted((Path(__file__).parents[2] / "launch" / "recipes").glob("*.toml"))

    assert recipes
    for recipe in recipes:
        named = [kind for kind in Kind if kind.value in recipe.stem.split("_")]
        (kind,) = named or [Kind.PURIFY]
        assert "valid" in invoke("config", "validate", "--for", kind, str(recipe))


def test_every_attack_has_a_description_of_its_settings():
    for kind in KINDS:
        assert '"trigger"' in invoke("config", "schema", "--for", kind)


def test_memory_that_ran_out_is_the_machines_fault():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)

    assert _machine_is_at_fault(caught.value)
    assert _machine_is_at_fault(MemoryError())
    assert _machine_is_at_fault(OSError(28, "No space left on device"))
    assert not _machine_is_at_fault(OSError(2, "No such file or directory"))
    assert not _machine_is_at_fault(RuntimeError("shape '[2]' is invalid"))
