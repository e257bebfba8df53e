import json
import os
import pickle
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from mimic_fast.launch.cli import _machine_is_at_fault, app
from mimic_fast.version import VERSION

# Seconds of work: few images, two epochs, everything allowed that a small clean set needs.
QUICK = (
    "--set",
    "data.clean_fraction=1",
    "--allow-budget",
    "--set",
    "optim.epochs=2",
    "--set",
    "optim.batch_size=30",
    "--device",
    "cpu",
)


def one_error_line(err: str) -> str:
    """The last line, and the only one that is an error; lines before it may say what went on."""
    lines = err.splitlines()
    assert [line.startswith("error: ") for line in lines] == [False] * (len(lines) - 1) + [True], (
        err
    )
    assert "Traceback" not in err
    return lines[-1]


# Without torch: the real program, from the interpreter on.


def run_program(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mimic_fast", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_takes_less_than_a_second_of_processor_time():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)

    done = run_program("--help")

    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert "purify" in done.stdout
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
def test_wrong_command_line_is_one_line_and_exit_2(arguments, message):
    done = run_program(*arguments)

    assert done.returncode == 2
    assert message in one_error_line(done.stderr)
    assert done.stdout == ""


def test_demo_replaces_only_an_earlier_demo(tmp_path):
    other = tmp_path / "work"
    other.mkdir()
    (other / "thesis.tex").write_text("years")

    done = run_program("demo", "--out", str(other))

    assert done.returncode == 2
    assert f"{other} holds files" in one_error_line(done.stderr)
    assert (other / "thesis.tex").exists()


# The rest of what needs no exit code, in this process.


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
    kinds = {"pretrain": "pretrain", "badencoder": "badencoder"}

    assert recipes
    for recipe in recipes:
        kind = kinds.get(recipe.stem.rpartition("_")[2], "purify")
        assert "valid" in invoke("config", "validate", "--for", kind, str(recipe))


def test_memory_that_ran_out_is_the_machines_fault():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)

    assert _machine_is_at_fault(caught.value)
    assert _machine_is_at_fault(MemoryError())
    assert _machine_is_at_fault(OSError(28, "No space left on device"))
    assert not _machine_is_at_fault(OSError(2, "No such file or directory"))
    assert not _machine_is_at_fault(RuntimeError("shape '[2]' is invalid"))


# With torch: forked from a process that has imported it.


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["teacher.pt", "teacher.safetensors"])
def test_pickle_with_a_payload_is_refused_and_not_executed(cli, tmp_path, name):
    marker = tmp_path / "executed"
    (tmp_path / name).write_bytes(pickle.dumps({"weight": Payload(marker)}))

    done = cli("purify", "--teacher", name, "--data", "fashion-mnist:train", "--out", "run")

    assert done.code == 4
    assert name in one_error_line(done.err)
    assert not marker.exists()


def test_damaged_checkpoint_is_exit_4(cli, tmp_path, teacher):
    (tmp_path / "teacher.safetensors").write_bytes(teacher.read_bytes()[:-100])

    done = cli("inspect", "teacher.safetensors")

    assert done.code == 4
    assert "teacher.safetensors" in one_error_line(done.err)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["encoder.architecture=timm:resnet81"], "resnet81"),
        (["encoder.architecture=timm:resnet50"], "resnet"),
    ],
)
def test_wrong_architecture_is_exit_2(cli, teacher, labeled, settings, message):
    options = [part for text in settings for part in ("--set", text)]

    done = cli("purify", "--teacher", teacher, "--data", labeled, "--out", "run", *QUICK, *options)

    assert done.code == 2
    assert message in one_error_line(done.err)


def test_image_size_that_does_not_fit_the_patches_is_exit_2(cli, encoders, labeled):
    size = ("--set", "encoder.image_size=18")

    done = cli(
        "purify", "--teacher", encoders["vit"], "--data", labeled, "--out", "run", *QUICK, *size
    )

    assert done.code == 2
    assert "18" in one_error_line(done.err)


def test_missing_teacher_is_exit_2(cli, labeled):
    done = cli("purify", "--teacher", "gone.safetensors", "--data", labeled, "--out", "run")

    assert done.code == 2
    assert "gone.safetensors does not exist" in one_error_line(done.err)


def test_empty_folder_is_exit_2(cli, tmp_path, teacher):
    (tmp_path / "empty").mkdir()

    done = cli("purify", "--teacher", teacher, "--data", "empty", "--out", "run")

    assert done.code == 2
    assert "empty" in one_error_line(done.err)


def test_more_images_than_the_budget_is_exit_2(cli, teacher, labeled):
    done = cli(
        "purify",
        *("--teacher", teacher, "--data", labeled / "train", "--out", "run"),
        *("--set", "data.clean_fraction=0.5"),
    )

    assert done.code == 2
    assert "--allow-budget" in one_error_line(done.err)


def test_duplicated_tap_is_exit_3_with_its_name(cli, teacher, labeled):
    done = cli(
        "purify",
        *("--teacher", teacher, "--data", labeled / "train", "--out", "run"),
        *QUICK,
        *("--set", "encoder.taps=['act1', 'maxpool', 'layer1']"),
    )

    assert done.code == 3
    assert "maxpool" in one_error_line(done.err)


def test_run_directory_that_cannot_be_written_is_exit_7(cli, tmp_path, teacher, labeled):
    (tmp_path / "file").write_text("not a folder")

    done = cli(
        "purify", "--teacher", teacher, "--data", labeled / "train", "--out", "file/run", *QUICK
    )

    assert done.code == 7
    assert "file/run" in one_error_line(done.err)


def test_inspect_prints_one_json_object(cli, teacher):
    done = cli("inspect", teacher, "--json")

    assert done.code == 0
    assert done.json["architecture"] == "timm:resnet18"
    assert done.err == ""


def test_inspect_prints_a_table(cli, teacher):
    done = cli("inspect", teacher)

    assert done.code == 0
    assert "timm:resnet18" in done.out
    assert "layer4" in done.out


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_locate_prints_and_writes_every_tap(cli, tmp_path, encoders, labeled, name):
    arguments = ("--teacher", encoders[name], "--data", labeled / "train", *QUICK)

    done = cli("locate", *arguments, "--out", "run", "--json")

    assert done.code == 0, done.err
    assert done.json == json.loads((tmp_path / "run" / "mutual_information.json").read_text())
    assert len(done.json["layers"]) == {"resnet": 4, "vit": 2}[name]


def test_purify_survives_a_corrupt_image_and_measures_what_it_can(cli, tmp_path, teacher, labeled):
    data = tmp_path / "images"
    data.mkdir()
    for path in (labeled / "train").rglob("*.png"):
        (data / path.name).symlink_to(path)
    (data / "bad.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a photograph")

    done = cli(
        "purify",
        *("--teacher", teacher, "--data", data, "--out", "run", *QUICK, "--json"),
        *("--downstream", f"shades={labeled}"),
    )

    assert done.code == 0, done.err
    assert "bad.jpg" in done.err
    assert "bad.jpg" in (tmp_path / "run" / "quarantine.json").read_text()
    assert done.json == json.loads((tmp_path / "run" / "report.json").read_text())
    assert done.json["encoders"]["purified"]["downstream"][0]["dataset"] == "shades"
    assert done.json["agreement"]["cosine"]["n"] == done.json["clean_set"]["size"] // 10
    purified = load_file(tmp_path / "run" / "encoder.safetensors")
    assert purified.keys() == load_file(teacher).keys()


def test_signal_saves_the_state_and_resume_goes_on(cli, tmp_path, teacher, labeled):
    arguments = (
        "purify",
        *("--teacher", teacher, "--data", labeled / "train", "--out", "run", *QUICK),
        *("--set", "optim.epochs=400"),
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    running = cli.start(*arguments)
    running.wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3)

    running.signal(signal.SIGTERM)
    done = running.wait()

    assert done.code == 6, done.err
    assert "--resume auto" in done.err
    assert list((tmp_path / "run" / "state").glob("step_*"))

    again = cli(*arguments)
    assert again.code == 2
    assert "--resume auto" in again.err

    other = cli(*arguments, "--resume", "auto", "--seed", "9")
    assert other.code == 2
    assert "other settings" in other.err

    resumed = cli.start(*arguments, "--resume", "auto")
    reached = metrics.read_text().count("\n")
    resumed.wait_for(lambda: metrics.read_text().count("\n") >= reached + 2)
    resumed.signal(signal.SIGINT)
    assert resumed.wait().code == 6
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > reached


def test_evaluate_brings_the_report_of_a_purification_up_to_date(cli, tmp_path, teacher, labeled):
    assert (
        cli(
            "purify", "--teacher", teacher, "--data", labeled / "train", "--out", "run", *QUICK
        ).code
        == 0
    )
    before = json.loads((tmp_path / "run" / "report.json").read_text())
    encoders = (
        *("--encoder", f"teacher={teacher}"),
        *("--encoder", "purified=run/encoder.safetensors"),
    )

    done = cli("evaluate", *encoders, "--downstream", f"shades={labeled}", "--out", "run", "--json")

    assert done.code == 0, done.err
    after = json.loads((tmp_path / "run" / "report.json").read_text())
    assert done.json == after
    for section in ("agreement", "mutual_information", "clean_set", "cost"):
        assert after[section] == before[section]
    assert after["comparisons"]
    accuracy = after["encoders"]["teacher"]["downstream"][0]["clean_accuracy"]
    assert 0.5 < accuracy["value"] <= 1

    other = cli(
        "evaluate", "--encoder", f"purified={teacher}", "--downstream", f"shades={labeled}",
        "--out", "run",
    )  # fmt: skip
    assert other.code == 2
    assert "other encoders" in one_error_line(other.err)


def test_attack_and_evaluate_print_a_table(cli, tmp_path, teacher, labeled):
    attacked = cli(
        "attack",
        "badencoder",
        *("--encoder", teacher, "--data", labeled / "train", "--out", "attacked"),
        *("--reference", "class:1", "--set", "optim.epochs=1", "--set", "optim.batch_size=50"),
        "--json",
    )
    assert attacked.code == 0, attacked.err
    assert attacked.json["attack"] == "attacked/attack.json"

    done = cli(
        "evaluate",
        *("--encoder", "teacher=attacked/encoder.safetensors", "--encoder", f"clean={teacher}"),
        *("--downstream", f"shades={labeled}", "--attack", "attacked/attack.json"),
        *("--out", "measured"),
    )

    assert done.code == 0, done.err
    assert "clean accuracy" in done.out
    assert "ASR" in done.out
    assert str(Path("measured/report.html")) in done.out
    assert (tmp_path / "measured" / "report.html").stat().st_size > 1000


def test_pretrain_writes_an_encoder_that_inspect_reads(cli, labeled):
    settings = (
        "spec.architecture=timm:resnet18",
        "spec.arguments={layers = [1, 1, 1, 1], channels = [8, 16, 32, 64]}",
        "spec.stem=small_stride2",
        "spec.image_size=16",
        "spec.mean=[0.5, 0.5, 0.5]",
        "spec.std=[0.25, 0.25, 0.25]",
        "optim.epochs=1",
        "optim.batch_size=32",
    )
    options = [part for text in settings for part in ("--set", text)]

    done = cli("pretrain", "--data", labeled / "train", "--out", "clean", *options, "--json")

    assert done.code == 0, done.err
    assert cli("inspect", done.json["encoder"], "--json").json["sha256"] == done.json["sha256"]
