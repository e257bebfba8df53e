"""One process or two, the same global batch: the same purification."""

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mimic_fast.distil import purify
from mimic_fast.launch.progress import progress_bars
from mimic_fast.recipe import load_settings

STEPS = 20
TERMS = ("loss", "clone", "attention", "contrastive")
# precision, weight of the contrastive term
RUNS = {"fp64": ("fp64", 0.0), "fp64-contrastive": ("fp64", 0.5), "fp32": ("fp32", 0.5)}
# The project's bar for processes against one.
EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
FILES = {
    "clean_set.json",
    "config.json",
    "encoder.json",
    "encoder.safetensors",
    "metrics.jsonl",
    "mutual_information.json",
    "mutual_information.png",
    "state",
}


def worker(teacher: str, source: str, folder: str, processes: int) -> str:
    """All the runs, under ``folder``; what this process had to say."""
    said = io.StringIO()
    for name, (precision, contrastive) in RUNS.items():
        settings = load_settings(
            overrides=(
                *("data.clean_fraction=1.0", "data.allow_budget=true", "data.hold_out=0.2"),
                *("optim.name=sgd", f"optim.precision={precision}", "optim.lr=3e-3"),
                *("optim.batch_size=16", "optim.epochs=4", "optim.warmup_epochs=0"),
                *(f"loss.contrastive={contrastive}", f"run.max_steps={STEPS}", "run.device=cpu"),
                *("mi.chunk=16", "run.keep=1"),
            ),
            values={
                "encoder": {"teacher": teacher},
                "data": {"source": source},
                "run": {"out": f"{folder}/{name}"},
            },
        )
        with contextlib.redirect_stderr(said), progress_bars() as report:
            purify(settings, world=processes, report=report)
    return said.getvalue()


@dataclass(frozen=True)
class Runs:
    """Run directories by number of processes, and what each of the two processes said."""

    folders: dict[int, Path]
    said: list[str]

    def __getitem__(self, world: int) -> Path:
        return self.folders[world]


@pytest.fixture(scope="module")
def runs(run_processes, teacher, images, tmp_path_factory) -> Runs:
    folders = {world: tmp_path_factory.mktemp(f"world{world}") for world in (1, 2)}
    common = {"teacher": str(teacher), "source": str(images / "train")}
    worker(**common, folder=str(folders[1]), processes=1)
    said = run_processes(worker, **common, folder=str(folders[2]), processes=2)
    return Runs(folders, said)


def logged(run: Path) -> Tensor:
    """Losses of every step, ``[step, term]``."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return torch.tensor([[row[term] for term in TERMS] for row in rows], dtype=torch.float64)


@pytest.mark.parametrize("name", ["fp64", "fp64-contrastive"])
def test_losses_and_weights_of_two_processes_are_those_of_one(runs, name):
    one, two = (runs[world] / name for world in (1, 2))

    torch.testing.assert_close(logged(two), logged(one), **EXACT)
    expected = load_file(one / "state" / "step_0000020" / "student.safetensors")
    assert {value.dtype for value in expected.values()} >= {torch.float64}
    torch.testing.assert_close(
        load_file(two / "state" / "step_0000020" / "student.safetensors"), expected, **EXACT
    )
    # The file holds the weights behind the last step in single precision: one rounding apart.
    torch.testing.assert_close(
        load_file(two / "encoder.safetensors"),
        load_file(one / "encoder.safetensors"),
        rtol=1.2e-7,
        atol=1e-9,
    )


def test_contrastive_term_counts_only_where_it_has_a_weight(runs):
    assert not logged(runs[2] / "fp64")[:, 3].any()
    assert logged(runs[2] / "fp64-contrastive")[:, 3].all()


def test_single_precision_differs_by_its_rounding_only(runs):
    one, two = (logged(runs[world] / "fp32") for world in (1, 2))

    torch.testing.assert_close(two[0], one[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(two[-1], one[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_mutual_information_of_two_processes_is_that_of_one(runs, name):
    one, two = (
        json.loads((runs[world] / name / "mutual_information.json").read_text()) for world in (1, 2)
    )

    assert two["layers"] == one["layers"]


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_leave_one_set_of_files(runs, name):
    found = {path.name for path in (runs[2] / name).iterdir()}

    assert found == FILES == {path.name for path in (runs[1] / name).iterdir()}
    assert [path.name for path in (runs[2] / name / "state").glob("step_*")] == ["step_0000020"]
    cards = [json.loads((runs[world] / name / "encoder.json").read_text()) for world in (1, 2)]
    assert cards[0]["clean_set"] == cards[1]["clean_set"]


def test_only_the_first_process_speaks(runs):
    first, second = runs.said

    assert first.count("2 process(es)") == len(RUNS)
    assert second == ""
