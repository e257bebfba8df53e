import json
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mimic_fast.data.manifest import (
    CleanItem,
    CleanSet,
    items_digest,
    read_clean_set,
    write_clean_set,
)
from mimic_fast.errors import MachineError, UnsafeInputError, UsageError

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=20)
DIGESTS = st.text("0123456789abcdef", min_size=64, max_size=64)
LABELS = st.none() | st.integers(0, 999)
ROWS = st.lists(
    st.tuples(st.integers(0, 2**40), NAMES, DIGESTS, LABELS),
    max_size=5,
    unique_by=lambda row: row[1],
)


@pytest.fixture
def clean_set() -> CleanSet:
    items = tuple(
        CleanItem(index=index, key=f"{index}.png", sha256="0" * 64, label=None, height=8, width=8)
        for index in range(3)
    )
    return CleanSet(
        source="data",
        seed=0,
        requested=3,
        fraction=0.03,
        items=items,
        quarantined=(("bad.png", "is empty"),),
        sha256=items_digest(items),
        hold_out=1,
    )


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=ROWS,
    source=NAMES,
    fraction=st.floats(0, 1),
    quarantined=st.lists(st.tuples(NAMES, NAMES), max_size=3),
)
def test_round_trip_is_exact(tmp_path, rows, source, fraction, quarantined):
    items = tuple(
        CleanItem(index=index, key=key, sha256=sha256, label=label, height=8, width=8)
        for index, key, sha256, label in rows
    )
    clean_set = CleanSet(
        source=source,
        seed=2**31 - 1,
        requested=6,
        fraction=fraction,
        items=items,
        quarantined=tuple(quarantined),
        sha256=items_digest(items),
        hold_out=len(items) // 2,
    )
    assert read_clean_set(write_clean_set(clean_set, tmp_path)) == clean_set


def test_write_names_what_was_quarantined(tmp_path, clean_set):
    path = write_clean_set(clean_set, tmp_path / "new" / "run")
    assert path == tmp_path / "new" / "run" / "clean_set.json"
    assert json.loads(path.with_name("quarantine.json").read_text()) == {
        "schema": 1,
        "source": "data",
        "items": [{"key": "bad.png", "reason": "is empty"}],
    }
    content = json.loads(path.read_text())
    assert content["schema"] == 2
    drawn = {"index": 1, "key": "1.png", "sha256": "0" * 64, "label": None}
    assert content["items"][1] == {**drawn, "height": 8, "width": 8}


def test_write_without_quarantine_writes_one_file(tmp_path, clean_set):
    write_clean_set(replace(clean_set, quarantined=()), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["clean_set.json"]


def test_write_where_nothing_can_be_written_raises(tmp_path, clean_set):
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot write"):
        write_clean_set(clean_set, tmp_path / "file" / "run")


def test_digest_depends_on_keys_contents_and_order_only(clean_set):
    first, *rest = clean_set.items
    same = (replace(first, index=77, label=3), *rest)
    assert items_digest(same) == clean_set.sha256
    for other in (
        (replace(first, key="x"), *rest),
        (replace(first, sha256="1" * 64), *rest),
        (*rest, first),
        tuple(rest),
    ):
        assert items_digest(other) != clean_set.sha256


def test_read_refuses_what_was_edited(tmp_path, clean_set):
    path = write_clean_set(clean_set, tmp_path)
    path.write_text(path.read_text().replace("1.png", "7.png"))
    with pytest.raises(UnsafeInputError, match="its items do not fit its sha256"):
        read_clean_set(path)


@pytest.mark.parametrize("text", ["", "{}", "[]", "\x00", '{"items": 3}', "null"])
def test_read_refuses_what_is_no_clean_set(tmp_path, text):
    path = tmp_path / "clean_set.json"
    path.write_text(text)
    with pytest.raises(UnsafeInputError, match=r"clean_set\.json is damaged: \w+"):
        read_clean_set(path)


def test_read_missing_file_raises(tmp_path):
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_clean_set(tmp_path / "clean_set.json")
