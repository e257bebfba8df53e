"""report.json: the schema that others rely on."""

import json

import pytest

from mimic_fast.errors import MachineError
from mimic_fast.report.collect import RunFacts, build_report, write_report


@pytest.fixture
def report(make_evaluation, run_facts, agreement, information):
    return build_report(
        make_evaluation(), run=run_facts, agreement=agreement, mutual_information=information
    )


def measures(value):
    if isinstance(value, dict):
        if {"value", "low", "high"} <= set(value) and "tap" not in value:
            yield value
        for part in value.values():
            yield from measures(part)
    elif isinstance(value, list):
        for part in value:
            yield from measures(part)


def test_report_has_the_keys_of_schema_1(report):
    assert report["schema"] == 1
    assert set(report["encoders"]) == {"teacher", "purified", "student_only", "clean"}
    for encoder in report["encoders"].values():
        assert set(encoder) == {"sha256", "downstream"}
        for entry in encoder["downstream"]:
            assert {"dataset", "probe", "clean_accuracy", "attacks"} <= set(entry)
            for attack in entry["attacks"]:
                assert {
                    "trigger",
                    "target",
                    "attack_success_rate",
                    "attack_success_rate_all",
                    "robust_accuracy",
                } <= set(attack)
    assert set(report["agreement"]) == {"cosine", "knn_overlap_10", "linear_cka"}
    assert {"size", "fraction", "sha256"} <= set(report["clean_set"])
    assert {"seconds", "images_per_second", "peak_memory_bytes"} <= set(report["cost"])
    assert report["mutual_information"]["layers"][0]["tap"] == "layer1"
    assert {"mimic_fast", "torch", "python", "created", "teacher_file"} <= set(report["provenance"])


def test_every_measure_has_its_four_keys_in_order(report):
    found = list(measures(report))
    differences = list(measures(report["comparisons"]))

    assert len(found) > 20
    assert len(differences) == 6
    for measure in found:
        p = {"p"} if measure in differences else set()
        assert set(measure) == {"value", "low", "high", "n"} | p
        assert measure["low"] <= measure["value"] <= measure["high"]
        assert measure["n"] > 0


def test_what_was_not_measured_is_absent():
    report = build_report({"encoders": {"teacher": {"sha256": "a"}}}, run=RunFacts(settings={}))

    assert set(report) == {"schema", "encoders", "settings", "provenance", "limits", "verdict"}


def test_files_are_written_whole_and_agree(tmp_path, report):
    page = write_report(tmp_path / "run", report)

    assert page == tmp_path / "run" / "report.html"
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == report
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert sorted(path.name for path in page.parent.iterdir()) == ["report.html", "report.json"]


def test_folder_that_cannot_be_written_is_the_machines_fault(tmp_path, report):
    (tmp_path / "file").write_text("")

    with pytest.raises(MachineError, match="cannot write"):
        write_report(tmp_path / "file", report)
