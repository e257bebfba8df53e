"""Options of a defense: its own settings, checked before anything runs."""

import re
from importlib import import_module
from inspect import signature
from pathlib import Path

import pytest

import mimic_fast.baselines
from mimic_fast.comparison.cell import finished, read_task, run_cell, write_task
from mimic_fast.comparison.cells import cells_of
from mimic_fast.comparison.defenses import _BASELINES, DEFENSES, defense_of, options_of
from mimic_fast.comparison.run import compare
from mimic_fast.encoders.ingest import load_encoder
from mimic_fast.errors import UsageError
from mimic_fast.evaluation.attack_file import record_targets
from mimic_fast.recipe import PRESETS

# As a baseline is written: a settings class and a function of the module's name.
SHRUNK = '''
"""Shrinks every weight; no defense, but it shows what it was given."""
from pathlib import Path

from pydantic import Field

from mimic_fast.config import Frozen
from mimic_fast.encoders.export import export_encoder
from mimic_fast.encoders.ingest import load_encoder


class ShrunkSettings(Frozen):
    factor: float = Field(default=0.5, gt=0, le=1, description="of the last block's weights")


def shrunk(settings, options, *, report, stop) -> Path:
    loaded = load_encoder(settings.encoder.teacher, settings.encoder)
    for weight in loaded.encoder.backbone.layer4.parameters():
        weight.data.mul_(options.factor)
    return export_encoder(loaded.encoder, settings.run.out, key_map=loaded.key_map, card={})
'''


@pytest.fixture
def shrunk(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "baselines"
    folder.mkdir()
    (folder / "shrunk.py").write_text(SHRUNK)
    paths = [*mimic_fast.baselines.__path__, str(folder)]
    monkeypatch.setattr(mimic_fast.baselines, "__path__", paths)
    monkeypatch.setitem(_BASELINES, "shrunk", "ShrunkSettings")


def defenses(**options: object) -> dict[str, object]:
    return {"x": {"kind": "shrunk", "options": options}}


@pytest.fixture
def ready(files: Path) -> Path:
    for name in ("first", "second"):
        record_targets(files / name, {"toy": 1})
    return files


@pytest.mark.parametrize("kind", DEFENSES)
def test_a_kind_without_options_refuses_them(kind):
    options_of(kind, {})
    with pytest.raises(UsageError, match=f"'{kind}' takes no options, got rate"):
        options_of(kind, {"rate": 1})


@pytest.mark.parametrize("kind", _BASELINES)
def test_every_baseline_has_a_function_and_settings_with_defaults(kind):
    function = getattr(import_module(f"mimic_fast.baselines.{kind}"), kind)

    assert list(signature(function).parameters) == ["settings", "options", "report", "stop"]
    assert options_of(kind, {}).model_dump(mode="json")
    assert callable(defense_of(kind))
    with pytest.raises(UsageError, match="unknown setting 'magic'"):
        options_of(kind, {"magic": 1})


def test_options_are_refused_before_anything_runs(matrix, tmp_path):
    wrong = {"x": {"kind": "none", "options": {"rate": 1}}}
    with pytest.raises(UsageError, match=r"defenses.x: .*takes no options"):
        compare(matrix(defenses=wrong), tmp_path / "out", report=lambda _: pytest.fail("ran"))
    assert not (tmp_path / "out").exists()


def test_an_unknown_option_is_refused_with_the_nearest_name(shrunk, matrix, tmp_path):
    settings = matrix(defenses=defenses(facter=0.1))
    with pytest.raises(UsageError, match=r"defenses.x: unknown setting 'facter'; .*'factor'"):
        compare(settings, tmp_path / "out")


def test_options_name_the_cell_with_their_defaults_filled_in(shrunk, ready, matrix, tmp_path):
    def digest(**options: object) -> str:
        return next(iter(cells_of(matrix(defenses=defenses(**options)), tmp_path))).digest

    assert digest() == digest(factor=0.5)
    assert digest() != digest(factor=0.25)


@pytest.mark.parametrize(
    "given",
    [
        {"preset": "mimic"},
        {"settings": {"optim": {"epochs": 3}}},
        {"settings": {"loss": {"clone": 2}}},
        {"settings": {"stop": {"rule": "plateau"}}},
        {"settings": {"data": {"crop_scale": [0.5, 1]}}},
        {"settings": {"data": {"grayscale": 0.5}}},
    ],
    ids=["preset", "optim", "loss", "stop", "data.crop_scale", "data.grayscale"],
)
def test_what_a_baseline_does_not_read_is_refused(shrunk, ready, matrix, tmp_path, given, request):
    settings = matrix(defenses={"x": {"kind": "shrunk", **given}})
    name = request.node.callspec.id
    with pytest.raises(UsageError, match=rf"defenses.x: kind 'shrunk' does not read {name}; "):
        list(cells_of(settings, tmp_path))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"data": {"jitter_probability": 0.1}}, "data.jitter_probability"),
        ({"stop": {"rule": "record"}}, "stop"),
    ],
)
def test_the_floor_refuses_what_it_would_not_take(ready, matrix, tmp_path, settings, name):
    given = {"kind": "student_only", "settings": settings}
    said = f"defenses.x: kind 'student_only' does not read {name}; leave it out"
    with pytest.raises(UsageError, match=re.escape(said)):
        list(cells_of(matrix(defenses={"x": given}), tmp_path))


def test_a_new_default_of_what_a_baseline_does_not_read_leaves_its_cells(
    shrunk, ready, matrix, tmp_path, monkeypatch
):
    def digests(kind: str) -> str:
        return next(iter(cells_of(matrix(defenses={"x": {"kind": kind}}), tmp_path))).digest

    before = {kind: digests(kind) for kind in ("shrunk", "none", "purify")}
    monkeypatch.setitem(PRESETS["hardened"], "optim", {"epochs": 7})
    monkeypatch.setitem(PRESETS["hardened"], "data", {"grayscale": 0.7, "crop_scale": [0.9, 1.0]})

    assert digests("shrunk") == before["shrunk"]
    assert digests("none") == before["none"]
    assert digests("purify") != before["purify"]


def test_a_baseline_gets_its_options(shrunk, ready, matrix, tmp_path):
    cell = next(iter(cells_of(matrix(defenses=defenses(factor=0.25)), tmp_path / "out")))

    run_cell(read_task(write_task(cell)))

    assert finished(cell) is not None
    before, after = (
        load_encoder(folder / "encoder.safetensors").encoder.backbone.get_parameter(
            "layer4.0.conv1.weight"
        )
        for folder in (ready / "first", cell.folder)
    )
    assert before.mul(0.25).equal(after)


def test_a_kind_that_is_not_there_names_those_that_are(shrunk):
    with pytest.raises(UsageError, match=r"no defense of kind 'magic'; .*student_only, .*shrunk"):
        defense_of("magic")
