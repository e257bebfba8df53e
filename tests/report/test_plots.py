"""Charts: well-formed, self-contained SVG that shows what it is given."""

import base64
import json
import re
import xml.etree.ElementTree as ET

import pytest

from mimic_fast.report.plots import (
    by_role,
    information_figure,
    loss_chart,
    mutual_information_chart,
    outcome_chart,
    role_title,
)

SVG = "{http://www.w3.org/2000/svg}"


def parse(uri: str) -> ET.Element:
    head, data = uri.split(",", 1)
    assert head == "data:image/svg+xml;base64"
    return ET.fromstring(base64.b64decode(data))


def words(uri: str) -> str:
    """Text of an SVG; matplotlib draws glyphs as paths and leaves the text as comments."""
    source = base64.b64decode(uri.split(",", 1)[1]).decode()
    return " ".join(re.findall(r"<!-- (.*?) -->", source))


def measure(value: float) -> dict[str, float]:
    return {"value": value, "low": max(0, value - 0.01), "high": min(1, value + 0.01), "n": 1000}


def write_rows(path, count: int, **columns) -> None:
    with path.open("w") as file:
        for step in range(count):
            row = {"step": step, **{key: make(step) for key, make in columns.items()}}
            file.write(json.dumps(row) + "\n")


def test_outcome_chart_names_encoders_and_values():
    rows = [("teacher", measure(0.831), measure(0.989)), ("purified", measure(0.82), None)]

    chart = outcome_chart(rows)

    assert parse(chart).tag == f"{SVG}svg"
    for word in ("Teacher", "Purified", "83.1", "98.9", "82.0", "Clean accuracy, %", "ASR"):
        assert word in words(chart)


def test_outcome_chart_without_an_attack_has_no_asr_panel():
    assert "ASR" not in words(outcome_chart([("teacher", measure(0.8), None)]))


def test_same_figures_give_the_same_bytes(information):
    assert mutual_information_chart(information) == mutual_information_chart(information)


def test_information_chart_shows_layers_and_marks_the_one_that_determines_the_features(
    information,
):
    text = words(mutual_information_chart(information))

    assert "layer1 " in text
    assert "layer4*" in text
    assert "layer3*" not in text


def test_information_chart_needs_neither_interval_nor_noise_floor(information):
    full = len(information_figure(information).axes[0].lines)
    for layer in information["layers"]:
        for key in ("noise_floor", "low", "high"):
            del layer[key]

    bare = information_figure(information)

    assert full == 8
    assert len(bare.axes[0].lines) == 0


def test_information_intervals_end_where_they_should(information):
    lines = information_figure(information).axes[0].lines

    assert lines[0].get_xdata() == pytest.approx([0.7, 1.3])


def test_loss_chart_leaves_unused_terms_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_rows(
        path,
        50,
        loss=lambda step: 1 / (step + 1),
        clone=lambda step: -0.5,
        contrastive=lambda step: 0.0,
        lr=lambda step: 1e-3,
    )

    text = words(loss_chart(path) or "")

    for word in ("Total loss", "Clone loss", "Learning rate", "Step"):
        assert word in text
    assert "Contrastive" not in text
    assert "Attention" not in text


def test_long_curves_stay_small(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_rows(path, 20_000, loss=lambda step: (step * 7919 % 1000) / 1000)

    chart = loss_chart(path)

    assert chart is not None
    assert len(chart) < 100_000


def test_torn_and_null_rows_are_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_rows(path, 5, loss=lambda step: None if step == 2 else 1.0 + step)
    with path.open("a") as file:
        file.write('{"step": 5, "lo')

    assert loss_chart(path) is not None


@pytest.mark.parametrize("content", [None, "", '{"step": 0, "loss": 1.0}\n', "[1]\nnonsense\n"])
def test_too_little_to_draw_is_no_chart(tmp_path, content):
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_text(content)

    assert loss_chart(path) is None


def test_roles_are_ordered_and_named():
    assert by_role({"mine": 0, "clean": 0, "purified": 0, "teacher": 0}) == [
        "teacher",
        "purified",
        "clean",
        "mine",
    ]
    assert role_title("student_only") == "Student-only (floor)"
    assert role_title("my_encoder") == "My encoder"
