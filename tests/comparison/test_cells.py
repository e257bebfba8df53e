"""What names a cell, and what does not."""

import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimic_fast.comparison import cells
from mimic_fast.comparison.cell import read_task, write_task
from mimic_fast.comparison.cells import cells_of
from mimic_fast.comparison.figures import COLUMNS, merged, read_results, write_results
from mimic_fast.comparison.heat_map import heat_map
from mimic_fast.comparison.table import entries, markdown
from mimic_fast.errors import UsageError
from mimic_fast.evaluation.attack_file import record_targets
from mimic_fast.recipe import load_settings


@pytest.fixture
def ready(files: Path) -> Path:
    for name in ("first", "second"):
        record_targets(files / name, {"toy": 1})
    return files


def row(**values: object) -> dict[str, str]:
    some = {
        "attack": "first",
        "defense": "hardened",
        "seed": 0,
        "dataset": "toy",
        "probe": "linear",
        **{"ca": 0.8, "ca_low": 0.7, "ca_high": 0.9, "asr": 0.1, "asr_low": 0.0, "asr_high": 0.2},
        "cpu_seconds": 3,
        **values,
    }
    return {column: str(some.get(column, "")) for column in COLUMNS}


def test_a_cell_is_the_same_wherever_it_lies(ready, matrix, tmp_path):
    digests = [cell.digest for cell in cells_of(matrix(), tmp_path / "a")]
    assert len(set(digests)) == len(digests) == 6
    assert [cell.digest for cell in cells_of(matrix(), tmp_path / "b")] == digests

    shutil.copytree(ready / "first", ready / "moved")
    settings = matrix()
    moved = settings.attacks["first"].model_copy(
        update={"encoder": ready / "moved" / "encoder.safetensors"}
    )
    attacks = {"renamed": moved, "second": settings.attacks["second"]}
    again = cells_of(settings.model_copy(update={"attacks": attacks}), tmp_path / "a")
    assert [cell.digest for cell in again] == digests


def test_whatever_changes_figures_names_another_cell(ready, matrix, values, tmp_path):
    def digest(**changes: object) -> str:
        return next(iter(cells_of(matrix(**changes), tmp_path))).digest

    base = digest()
    evaluation = values()["evaluation"]
    others = [
        digest(evaluation={**evaluation, "probe": ["knn"]}),
        digest(evaluation={**evaluation, "test_images": 7}),
        digest(evaluation_seed=1),
        digest(seeds=[5]),
        digest(data={**values()["data"], "clean_count": 89}),
        digest(defenses={"none": {"kind": "clean"}}),
    ]
    assert len({base, *others}) == 7
    assert digest(evaluation={**evaluation, "cache": "features"}) == base
    encoder = ready / "first" / "encoder.safetensors"
    encoder.write_bytes((ready / "second" / "encoder.safetensors").read_bytes())
    assert digest() != base


def test_an_attack_without_target_is_refused(files, matrix, tmp_path):
    with pytest.raises(UsageError, match="first has no target on toy"):
        list(cells_of(matrix(), tmp_path))


def test_a_task_file_is_the_cell(ready, matrix, tmp_path):
    for cell in cells_of(matrix(), tmp_path / "out"):
        assert read_task(write_task(cell)) == cell


def test_a_setting_younger_than_committed_rows_leaves_their_digest(
    ready, matrix, tmp_path, monkeypatch
):
    def digest(**sections: object) -> str:
        own = {"kind": "purify", "settings": sections}
        return next(iter(cells_of(matrix(defenses={"own": own}), tmp_path))).digest

    known = digest()
    assert digest(mi={"weighting": "information"}) == known
    assert digest(mi={"weighting": "uniform"}) != known
    assert digest(stop={"patience": 10}) == known != digest(stop={"rule": "plateau"})
    monkeypatch.setattr(cells, "_LATER", {})
    assert digest() != known  # the digest would have it, as it has every setting


def test_a_preset_keeps_what_the_matrix_does_not_set(ready, matrix, tmp_path):
    short = {"data": {"flip": 0.0}}
    defenses = {"own": {"kind": "purify", "preset": "hardened", "settings": short}}
    cell = next(iter(cells_of(matrix(defenses=defenses), tmp_path)))
    assert cell.settings.data.crop_scale == load_settings().data.crop_scale != (0.2, 1.0)
    assert cell.settings.data.flip == 0.0
    assert cell.settings.data.clean_count == 90


@given(
    st.lists(
        st.tuples(
            st.sampled_from("ab"), st.integers(0, 2), st.sampled_from("xy"), st.integers(0, 9)
        )
    )
)
def test_results_hold_the_newest_of_every_cell_and_set(drawn):
    rows = [row(attack=a, seed=s, dataset=d, ca=value / 10) for a, s, d, value in drawn]
    found = merged(rows[: len(rows) // 2], rows[len(rows) // 2 :])

    newest = {(one["attack"], one["seed"], one["dataset"]): one for one in rows}
    assert {(one["attack"], one["seed"], one["dataset"]): one for one in found} == newest
    assert len(found) == len(newest)


def test_results_are_read_as_they_were_written(tmp_path):
    rows = [row(seed=0), row(seed=1, defense='a,"b')]
    write_results(tmp_path / "r.csv", rows)
    assert read_results(tmp_path / "r.csv") == rows
    assert read_results(tmp_path / "none.csv") == []
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match="no results file"):
        read_results(tmp_path / "other.csv")


def test_several_seeds_are_a_mean_with_students_interval():
    rows = [row(seed=s, ca=value) for s, value in enumerate((0.6, 0.7, 0.8))]
    (entry,) = entries(rows, dataset="toy", probe="linear")
    # t(2) = 4.303, standard error 0.1 / sqrt(3)
    assert entry.seeds == 3
    assert entry.accuracy.value == pytest.approx(0.7)
    assert entry.accuracy.high - 0.7 == pytest.approx(4.30265 * 0.1 / 3**0.5, rel=1e-5)
    assert "70.0 (45.2..94.8)" in markdown(rows)


def test_one_seed_keeps_its_interval_over_images_and_nothing_measured_is_a_dash():
    text = markdown([row(asr="", asr_low="", asr_high="")])
    assert "| 80.0 (70.0..90.0) | - | 1 | 3 |" in text


def test_names_cannot_break_the_page():
    page = heat_map([row(dataset="<script>alert(1)</script>", defense="a&b")])
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "a&amp;b" in page


def test_every_cell_of_the_map_has_its_number_in_readable_ink():
    rows = [row(defense=f"d{n}", asr=n / 10, ca=0.9 - n / 20) for n in range(11)]
    page = heat_map(rows)
    cells = re.findall(r"background:#(\w{6});color:#(\w+)\">([\d.]+)<small>", page)
    assert [float(value) for _, _, value in cells[:11]] == [10.0 * n for n in range(11)]

    def luminance(color: str) -> float:
        color = "".join(2 * c for c in color) if len(color) == 3 else color
        parts = [int(color[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for back, ink, _ in cells:
        light, dark = sorted((luminance(back), luminance(ink)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, back  # WCAG AA
    shades = [luminance(back) for back, _, _ in cells[:11]]
    assert shades == sorted(shades, reverse=True)  # reads in gray


def test_results_of_before_the_p_columns_are_read(tmp_path):
    older = [name for name in COLUMNS if not name.startswith("p_")]
    assert len(older) == len(COLUMNS) - 2
    (tmp_path / "r.csv").write_text(
        ",".join(older) + "\n" + ",".join(f"v{place}" for place in range(len(older))) + "\n"
    )

    (read,) = read_results(tmp_path / "r.csv")

    assert tuple(read) == COLUMNS
    assert read["p_ca_minus_teacher"] == read["p_asr_minus_teacher"] == ""
    assert [read[name] for name in older] == [f"v{place}" for place in range(len(older))]
    write_results(tmp_path / "r.csv", [read])
    assert read_results(tmp_path / "r.csv") == [read]
