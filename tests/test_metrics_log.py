import json
import math
from pathlib import Path

import pytest

from mimic_fast.errors import MachineError
from mimic_fast.metrics_log import append_metrics, truncate_metrics


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_truncate_drops_rows_after_the_resumed_step(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    for step in range(1, 7):
        append_metrics(path, {"step": step, "loss": 1 / step})

    truncate_metrics(path, 4)
    append_metrics(path, {"step": 5, "loss": 0.5})

    assert rows(path) == [{"step": s, "loss": 1 / s} for s in range(1, 5)] + [
        {"step": 5, "loss": 0.5}
    ]


def test_truncate_drops_a_torn_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_metrics(path, {"step": 1})
    with path.open("a") as file:
        file.write('{"step": 2, "lo')

    truncate_metrics(path, 9)

    assert rows(path) == [{"step": 1}]


def test_truncate_names_a_damaged_line_in_the_middle(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n\x00\x00\n{"step": 2}\n')

    with pytest.warns(UserWarning, match="metrics.jsonl:2 "):
        truncate_metrics(path, 9)

    assert rows(path) == [{"step": 1}, {"step": 2}]


def test_truncate_of_a_missing_file_does_nothing(tmp_path):
    truncate_metrics(tmp_path / "metrics.jsonl", 0)

    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_not_finite_become_null(tmp_path):
    path = tmp_path / "metrics.jsonl"

    append_metrics(path, {"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.1})

    assert rows(path) == [{"step": 1, "loss": None, "grad_norm": None, "lr": 0.1}]


@pytest.mark.parametrize("row", [{}, {"step": 1.5}, {"step": "1"}])
def test_row_without_a_step_is_refused(tmp_path, row):
    with pytest.raises(ValueError, match="integer 'step'"):
        append_metrics(tmp_path / "metrics.jsonl", row)


def test_unwritable_file_is_a_machine_error(tmp_path):
    (tmp_path / "run").write_text("a file where the directory should be")

    with pytest.raises(MachineError, match=r"metrics\.jsonl"):
        append_metrics(tmp_path / "run" / "metrics.jsonl", {"step": 1})
