"""Every command on small encoders and images, in processes of their own."""

import json
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file


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
def test_locate_prints_and_writes_every_tap(cli, tmp_path, encoders, labeled, name, quick):
    arguments = ("--teacher", encoders[name], "--data", labeled / "train", *quick)

    done = cli("locate", *arguments, "--out", "run", "--json")

    assert done.code == 0, done.err
    assert done.json == json.loads((tmp_path / "run" / "mutual_information.json").read_text())
    assert len(done.json["layers"]) == {"resnet": 4, "vit": 2}[name]


def test_purify_survives_a_corrupt_image_and_measures_what_it_can(
    cli, tmp_path, teacher, labeled, quick
):
    data = tmp_path / "images"
    data.mkdir()
    for path in (labeled / "train").rglob("*.png"):
        (data / path.name).symlink_to(path)
    (data / "bad.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a photograph")

    done = cli(
        "purify",
        *("--teacher", teacher, "--data", data, "--out", "run", *quick, "--json"),
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


def test_signal_saves_the_state_and_resume_goes_on(cli, tmp_path, teacher, labeled, quick):
    arguments = (
        "purify",
        *("--teacher", teacher, "--data", labeled / "train", "--out", "run", *quick),
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


def test_evaluate_brings_the_report_of_a_purification_up_to_date(
    cli, tmp_path, teacher, labeled, quick
):
    assert (
        cli(
            "purify", "--teacher", teacher, "--data", labeled / "train", "--out", "run", *quick
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
    assert "other encoders" in other.error
    fewer = cli("evaluate", *encoders[:2], "--downstream", f"shades={labeled}", "--out", "run")
    assert fewer.code == 2
    assert "also holds the figures of purified" in fewer.error
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == after


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


def test_several_targets_are_measured_together_in_every_command(cli, tmp_path, teacher, labeled):
    attacked = cli(
        "attack",
        "badencoder",
        *("--encoder", teacher, "--data", labeled / "train", "--out", "attacked"),
        *("--reference", "class:1", "--trigger", "white_patch"),
        *("--reference", "class:0", "--trigger", "sinusoid"),
        *("--set", "optim.epochs=1", "--set", "optim.batch_size=50"),
        *("--downstream", f"shades={labeled}"),
    )
    assert attacked.code == 0, attacked.err
    rows = [line for line in attacked.out.splitlines() if line.startswith("shades, linear probe")]
    triggers = ["white_patch", "sinusoid"]
    assert [row.rpartition("trigger ")[2] for row in rows] == [f"{t})" for t in triggers] * 2
    for place, trigger in zip((".", "target_2"), triggers, strict=True):
        content = json.loads((tmp_path / "attacked" / place / "attack.json").read_text())
        assert set(content["targets"]) == {"shades"}
        measured = content["facts"]["measured"]
        assert [(row["encoder"], row["trigger"]) for row in measured] == [
            ("teacher", trigger),
            ("clean", trigger),
        ]

    measure = (
        "evaluate",
        *("--encoder", "teacher=attacked/encoder.safetensors", "--encoder", f"purified={teacher}"),
        *("--downstream", f"shades={labeled}"),
    )
    done = cli(*measure, "--attack", "attacked", "--out", "measured")
    assert done.code == 0, done.err
    assert "attacked has further targets, measured too: target_2" in done.err
    assert all(trigger in done.out for trigger in triggers)
    report = json.loads((tmp_path / "measured" / "report.json").read_text())
    assert [row["trigger"] for row in report["comparisons"]] == triggers
    captions = [figure["caption"] for figure in report["figures"]]
    assert captions
    assert all("the first, white_patch, is shown" in caption for caption in captions)

    files = ("attacked/attack.json", "attacked/target_2/attack.json")
    listed = cli(*measure, "--attack", files[0], "--attack", files[1], "--json")
    assert listed.code == 0, listed.err
    assert listed.json["encoders"] == report["encoders"]

    twice = cli(*measure, "--attack", "attacked", "--attack", files[1])
    assert twice.code == 2
    assert "same trigger 'sinusoid'; give each attack once" in twice.error


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


def test_two_processes_make_one_run(torchrun, tmp_path, teacher, labeled, quick):
    out = tmp_path / "run"

    done = torchrun(
        [
            *("-m", "mimic_fast", "purify", "--teacher", str(teacher)),
            *("--data", str(labeled / "train"), "--out", str(out), *quick),
        ]
    )

    assert done.returncode == 0, done.stdout
    assert done.stdout.count("report: ") == 1
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    assert "2 process(es)" in done.stdout
