"""One process or two, the same global batch: the same pre-training, by SimCLR and by BYOL."""

import contextlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mimic_fast.errors import MachineError, StoppedError, UsageError
from mimic_fast.launch.cli import run
from mimic_fast.pretraining import PretrainSettings, pretrain
from mimic_fast.recipe import load_recipe

STEPS, STOPPED = 4, 2
METHODS = ("simclr", "byol")
# The project's bar for processes against one.
EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
RECIPE = f"""
[spec]
architecture = "timm:resnet18"
arguments = {{ layers = [1, 1, 1, 1], channels = [8, 16, 32, 64] }}
stem = "small_stride2"
image_size = 16
mean = [0.5, 0.5, 0.5]
std = [0.25, 0.25, 0.25]
[optim]
name = "sgd"
lr = 0.02
precision = "fp64"
batch_size = 16
epochs = 2
warmup_epochs = 0
[run]
device = "cpu"
max_steps = {STEPS}
"""


def stopped(recipe: str, source: str, out: str, method: str, processes: int) -> None:
    """A run that is told to stop, the last process alone, and leaves its state."""
    polls: list[None] = []

    def stop() -> bool:
        polls.append(None)
        return len(polls) == STOPPED and int(os.environ.get("RANK", "0")) == processes - 1

    values = {"method": method, "data": {"source": source}, "run": {"out": out}}
    settings = load_recipe(PretrainSettings, Path(recipe), values=values)
    with contextlib.suppress(StoppedError):
        pretrain(settings, world=processes, stop=stop)


def worker(recipe: str, pictures: str, folder: str, processes: int) -> dict[str, Any]:
    """All the runs, under ``folder``: exit codes and what this process said."""
    source, said, codes = f"{pictures}/train", io.StringIO(), {}

    def call(name: str, *arguments: str, command: tuple[str, ...] = ("pretrain",)) -> None:
        given = (recipe, "--data", source, "--out", f"{folder}/{name}", *arguments)
        codes[name] = run([*command, *given])

    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        for method in METHODS:
            stopped(recipe, source, f"{folder}/{method}_stopped", method, processes)
            call(method, "--set", f"method={method}")
            other = f"{method}_stopped_by_{3 - processes}"
            if Path(folder, other).exists():
                call(other, "--set", f"method={method}", "--resume", "auto")
        poisoned = ("--target", "1", "--set", "poison_rate=0.1", "--set", "method=byol")
        measured = (
            "--downstream",
            f"tints={pictures}",
            "--json",
            "--set",
            "evaluation.probe=['knn']",
        )
        call("ctrl", *poisoned, *measured, command=("attack", "ctrl"))
        call("odd", "--set", "optim.batch_size=15")
        # Only the measuring, which is process 0's, finds a file where a folder should be.
        full = ("--set", f"evaluation.cache='{recipe}'", "--set", "run.max_steps=1")
        call("unwritable", *poisoned, *measured, *full, command=("attack", "ctrl"))
        if processes == 2:
            call("cut", "--set", "run.engine=fsdp2", "--set", "optim.channels_last=false")
            # Each process its own images: no share of one order.
            source = f"{pictures}/{('train', 'test')[int(os.environ['RANK'])]}"
            call("strangers")
    return {"codes": codes, "said": said.getvalue()}


@dataclass(frozen=True)
class Runs:
    """Run directories by number of processes, and what came of the processes."""

    folders: dict[int, Path]
    one: dict[str, Any]
    two: list[dict[str, Any]]

    def __getitem__(self, world: int) -> Path:
        return self.folders[world]


@pytest.fixture(scope="module")
def runs(run_processes, images, tmp_path_factory) -> Runs:
    root = tmp_path_factory.mktemp("pretraining")
    (root / "recipe.toml").write_text(RECIPE)
    common = {"recipe": str(root / "recipe.toml"), "pictures": str(images)}
    folders = {world: root / f"world{world}" for world in (1, 2)}
    folders[1].mkdir()
    for method in METHODS:
        out = folders[2] / f"{method}_stopped_by_1"
        stopped(common["recipe"], f"{images}/train", str(out), method, 1)
    two = run_processes(worker, **common, folder=str(folders[2]), processes=2, timeout=300)
    for method in METHODS:
        (folders[2] / f"{method}_stopped").rename(folders[1] / f"{method}_stopped_by_2")
    one = worker(**common, folder=str(folders[1]), processes=1)
    return Runs(folders, one, two)


def logged(out: Path) -> Tensor:
    """Losses of every step, ``[step, term]``."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in lines] == list(range(1, STEPS + 1))
    names = ("loss", "contrastive", "byol", "grad_norm")
    return torch.tensor([[row[name] for name in names] for row in lines], dtype=torch.float64)


def saved(out: Path, group: str) -> dict[str, Tensor]:
    return load_file(out / "state" / f"step_{STEPS:07d}" / f"{group}.safetensors")


def assert_same_run(found: Path, expected: Path, *groups: str) -> None:
    torch.testing.assert_close(logged(found), logged(expected), **EXACT)
    for group in groups:
        assert saved(expected, group)["tapped.encoder.backbone.conv1.weight"].dtype == torch.float64
        torch.testing.assert_close(saved(found, group), saved(expected, group), **EXACT)
    # The file holds the weights behind the last step in single precision: one rounding apart.
    files = [load_file(out / "encoder.safetensors") for out in (found, expected)]
    torch.testing.assert_close(*files, rtol=1.2e-7, atol=1e-9)


GROUPS = {"simclr": ("student",), "byol": ("student", "target")}


@pytest.mark.parametrize("method", METHODS)
def test_losses_and_weights_of_two_processes_are_those_of_one(runs, method):
    assert_same_run(runs[2] / method, runs[1] / method, *GROUPS[method])
    losses = logged(runs[1] / method)
    own, other = (1, 2) if method == "simclr" else (2, 1)
    assert torch.equal(losses[:, 0], losses[:, own])
    assert not losses[:, other].any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("world", [1, 2])
def test_run_goes_on_in_another_number_of_processes(runs, method, world):
    resumed = runs[world] / f"{method}_stopped_by_{3 - world}"

    assert_same_run(resumed, runs[1] / method, *GROUPS[method])


def test_student_cut_over_processes_is_written_whole(runs):
    torch.testing.assert_close(logged(runs[2] / "cut"), logged(runs[1] / "simclr"), **EXACT)
    files = [
        load_file(out / "encoder.safetensors") for out in (runs[2] / "cut", runs[1] / METHODS[0])
    ]
    torch.testing.assert_close(*files, rtol=1.2e-7, atol=1e-9)


def test_poisoning_is_the_same_and_measured_once(runs):
    assert_same_run(runs[2] / "ctrl", runs[1] / "ctrl", "student", "target")
    one, two = (json.loads((runs[w] / "ctrl" / "attack.json").read_text()) for w in (1, 2))
    assert one["facts"]["poisoned_images"] == two["facts"]["poisoned_images"] == 10
    assert one["targets"] == two["targets"]
    assert [row["dataset"] for row in two["facts"]["measured"]] == ["tints"]


def test_processes_leave_with_the_same_exit_code(runs):
    first, second = (one["codes"] for one in runs.two)

    assert first == second
    expected = dict.fromkeys(first, 0) | {
        "odd": UsageError.exit_code,
        "strangers": UsageError.exit_code,
        "unwritable": MachineError.exit_code,
    }
    assert first == expected
    assert runs.one["codes"]["unwritable"] == MachineError.exit_code
    assert "read different images" in runs.two[0]["said"]


def test_only_the_first_process_speaks_of_what_went_well(runs):
    first, second = (one["said"] for one in runs.two)

    assert "2 process(es) on cpu, byol" in first
    assert '"measured"' in first
    lines = [line for line in second.splitlines() if not line.startswith(("error", "warning"))]
    assert lines == []
