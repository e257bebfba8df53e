"""How a cell reads its encoders, where it computes, and what is run once."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mimic_fast.comparison.cell import finished, run_cell, write_task
from mimic_fast.comparison.cells import cells_of
from mimic_fast.comparison.run import compare
from mimic_fast.errors import StoppedError, UsageError
from mimic_fast.evaluation.attack_file import read_attack, record_targets
from mimic_fast.evaluation.trigger_files import load_trigger
from tests.comparison.conftest import SPEC

READ = SPEC.model_dump(mode="json")


@pytest.fixture
def ready(files: Path) -> Path:
    for name in ("first", "second"):
        record_targets(files / name, {"toy": 1})
    return files


def without_card(encoder: Path) -> None:
    save_file(load_file(encoder), encoder)
    encoder.with_suffix(".json").unlink()


def figures(cell) -> list[dict[str, str]]:
    write_task(cell)
    run_cell(cell)
    rows = finished(cell)
    assert rows is not None
    other = ("seconds", "cpu_seconds", "digest")
    return [{name: value for name, value in row.items() if name not in other} for row in rows]


@pytest.mark.parametrize("kind", ["none", "clean"])
def test_an_encoder_without_card_is_read_alike_in_every_role(ready, matrix, values, tmp_path, kind):
    attack = values()["attacks"]["first"]

    def one(folder: str, **loading: object):
        changed = {"defenses": {"x": {"kind": kind}}, "attacks": {"first": {**attack, **loading}}}
        return figures(next(iter(cells_of(matrix(**changed), tmp_path / folder))))

    carded = one("carded")
    for name in ("first", "clean"):
        without_card(ready / name / "encoder.safetensors")

    bare = one("bare", loading=READ)

    assert bare == carded
    if kind == "none":
        assert float(bare[0]["ca_minus_teacher"]) == float(bare[0]["asr_minus_teacher"]) == 0


def test_targets_are_worked_out_on_the_encoder_as_the_cells_read_it(
    files, matrix, values, tmp_path
):
    settings = {
        "defenses": {"x": {"kind": "none"}},
        "attacks": {"first": {**values()["attacks"]["first"], "loading": READ}},
    }
    path = files / "first" / "attack.json"
    untouched = path.read_text()

    def target() -> int:
        with pytest.raises(StoppedError):  # once it is there, so that no cell runs
            compare(
                matrix(**settings),
                tmp_path / "out",
                stop=lambda: bool(read_attack(path).targets),
            )
        return read_attack(path).targets["toy"]

    carded = target()
    path.write_text(untouched)
    without_card(files / "first" / "encoder.safetensors")

    assert target() == carded


def test_how_an_encoder_is_read_belongs_to_the_attack(ready, matrix, values, tmp_path):
    attack = values()["attacks"]["first"]
    with pytest.raises(UsageError, match=r"loading.*teacher.*attacks.NAME.encoder"):
        matrix(attacks={"first": {**attack, "loading": {"teacher": "x.safetensors"}}})
    own = {"x": {"kind": "purify", "settings": {"encoder": {"mean": [0.5, 0.5, 0.5]}}}}
    with pytest.raises(UsageError, match=r"settings.encoder.mean .* attacks.NAME.loading"):
        list(cells_of(matrix(defenses=own), tmp_path))
    taps = {"x": {"kind": "purify", "settings": {"encoder": {"taps": ["layer4"]}}}}
    cell = next(
        iter(
            cells_of(
                matrix(defenses=taps, attacks={"first": {**attack, "loading": READ}}), tmp_path
            )
        )
    )
    assert (cell.settings.encoder.taps, cell.settings.encoder.mean) == (("layer4",), SPEC.mean)


def test_how_an_encoder_is_read_names_the_cell(ready, matrix, values, tmp_path):
    attack = values()["attacks"]["first"]

    def digest(**loading: object) -> str:
        attacks = {"first": {**attack, "loading": loading}}
        return next(iter(cells_of(matrix(attacks=attacks), tmp_path))).digest

    assert digest() != digest(mean=[0.5, 0.5, 0.5])


def test_a_trigger_is_known_by_what_it_does_under_any_file_name(ready, matrix, tmp_path):
    def digest() -> str:
        return next(iter(cells_of(matrix(), tmp_path))).digest

    base = digest()
    folder = ready / "first"
    (folder / "trigger.safetensors").rename(folder / "patch.safetensors")
    path = folder / "attack.json"
    path.write_text(path.read_text().replace("trigger.safetensors", "patch.safetensors"))
    assert digest() == base

    trigger = load_trigger(folder / "patch.safetensors")
    changed = {
        "mask": trigger.mask * 0.5,
        "pattern": trigger.pattern * 0.5,
    }
    found = {base}
    for name, value in changed.items():
        arrays = {"mask": trigger.mask, "pattern": trigger.pattern, name: value}
        save_file(arrays, folder / "patch.safetensors", metadata={"name": trigger.name})
        found.add(digest())
    arrays = {"mask": trigger.mask, "pattern": trigger.pattern}
    save_file(
        {**arrays, "add": torch.ones(1, dtype=torch.uint8)},
        folder / "patch.safetensors",
        metadata={"name": trigger.name},
    )
    found.add(digest())
    assert len(found) == 4


@pytest.mark.parametrize("kind", ["none", "clean"])
def test_a_kind_without_randomness_runs_once(ready, matrix, tmp_path, kind):
    settings = matrix(seeds=[4, 1, 2], defenses={"x": {"kind": kind}})
    assert [cell.title for cell in cells_of(settings, tmp_path)] == ["first/x/4", "second/x/4"]
    random = matrix(seeds=[4, 1, 2], defenses={"x": {"kind": "purify"}})
    assert len(list(cells_of(random, tmp_path))) == 6


def test_further_seeds_of_a_kind_without_randomness_are_ignored_with_a_warning(
    ready, matrix, tmp_path
):
    settings = matrix(defenses={"x": {"kind": "none", "seeds": [3, 4, 5]}})
    with (
        pytest.warns(UserWarning, match=r"defenses.x: .*'none' .* runs once.* 4, 5 are ignored"),
        pytest.raises(StoppedError),
    ):
        compare(settings, tmp_path, stop=lambda: True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device to compute on")
def test_a_cell_computes_where_its_settings_say(ready, matrix, tmp_path):
    cell = next(iter(cells_of(matrix(), tmp_path)))
    run = cell.settings.run.model_copy(update={"device": "cuda"})
    with pytest.raises(UsageError, match="no CUDA device is visible"):
        run_cell(replace(cell, settings=cell.settings.model_copy(update={"run": run})))
