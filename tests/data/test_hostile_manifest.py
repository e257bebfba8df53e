"""A clean set's manifest made by somebody who means harm: one clear line, and nothing read."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mimic_fast.data.clean_set import load_clean_images
from mimic_fast.data.manifest import (
    CleanItem,
    CleanSet,
    items_digest,
    read_clean_set,
    write_clean_set,
)
from mimic_fast.errors import UnsafeInputError

PROPERTY = settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


def clean_set(keys: list[str]) -> CleanSet:
    items = tuple(
        CleanItem(index=index, key=key, sha256=f"{index:064x}", label=None, height=8, width=8)
        for index, key in enumerate(keys)
    )
    return CleanSet(
        source="data",
        seed=0,
        requested=len(keys),
        fraction=0.5,
        items=items,
        quarantined=(),
        sha256=items_digest(items),
        hold_out=0,
    )


@pytest.fixture
def manifest(tmp_path) -> Path:
    return write_clean_set(clean_set(["a.png", "b.png", "c.png"]), tmp_path / "run")


def outcome(path: Path) -> CleanSet | None:
    """The set, or None where it is refused in one line; either way nothing is written."""
    before = sorted(path.parent.iterdir())
    try:
        result, message = read_clean_set(path), "one line"
    except UnsafeInputError as error:
        result, message = None, str(error)
    assert len(message.splitlines()) == 1
    assert len(message) < 1000 + len(str(path))
    assert sorted(path.parent.iterdir()) == before
    return result


@PROPERTY
@given(st.binary(max_size=300))
def test_random_bytes_are_refused(tmp_path, data):
    path = tmp_path / "clean_set.json"
    path.write_bytes(data)
    assert outcome(path) is None


@PROPERTY
@given(JSON)
def test_random_json_is_refused(tmp_path, content):
    path = tmp_path / "clean_set.json"
    path.write_text(json.dumps(content))
    assert outcome(path) is None


@PROPERTY
@given(
    cut=st.none() | st.integers(0, 900),
    changes=st.lists(
        st.tuples(st.integers(0, 900), st.sampled_from(b'\x00"[]{},:0-9eE.\\\xff')), max_size=4
    ),
)
def test_mutated_manifest_is_read_or_refused(manifest, cut, changes):
    whole = write_clean_set(clean_set(["a.png", "b.png", "c.png"]), manifest.parent).read_bytes()
    data = bytearray(whole)
    for at, value in changes:
        data[at % len(data)] = value
    manifest.write_bytes(data[:cut])
    result = outcome(manifest)
    if result is not None:  # what the digest covers is as it was
        covered = [(item.key, item.sha256) for item in result.items]
        assert covered == [(item["key"], item["sha256"]) for item in json.loads(whole)["items"]]


@PROPERTY
@given(st.sampled_from(["items", "seed", "sha256", "fraction", "quarantined", "hold_out"]), JSON)
def test_foreign_field_is_read_or_refused(manifest, name, value):
    write_clean_set(clean_set(["a.png", "b.png"]), manifest.parent)
    content = json.loads(manifest.read_bytes())
    content[name] = value
    manifest.write_text(json.dumps(content))
    outcome(manifest)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"items": ' * 50_000,
        '{"items": [{"index": ' + "9" * 5000 + "}]}",
        '{"source": "' + "s" * 1_000_000 + '"}',
        '{"items": [], "sha256": "\\ud800"}',
        '{"fraction": 1e999999}',
    ],
    ids=["deep list", "deep object", "long number", "long text", "lone surrogate", "huge number"],
)
def test_json_that_strains_a_parser_is_refused(tmp_path, text):
    path = tmp_path / "clean_set.json"
    path.write_text(text)
    assert outcome(path) is None


@pytest.mark.parametrize("key", ["../../secret.png", "/etc/passwd", "~/.ssh/id_rsa", "a\0b"])
def test_key_that_is_a_path_elsewhere_is_not_read(tmp_path, make_source, key):
    path = write_clean_set(clean_set(["0000.png", key]), tmp_path / "run")
    read = read_clean_set(path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UnsafeInputError, match="of the clean set is no longer in memory"):
        load_clean_images(make_source(3), read, image_size=8, channels=3)
    assert sorted(tmp_path.rglob("*")) == before


def test_items_of_other_content_are_refused(tmp_path, make_source):
    path = write_clean_set(clean_set(["0000.png", "0001.png"]), tmp_path / "run")
    with pytest.raises(UnsafeInputError, match=r"0000\.png of memory has changed since it was"):
        load_clean_images(make_source(3), read_clean_set(path), image_size=8, channels=3)


def test_key_that_comes_twice_is_refused_by_name(tmp_path):
    path = write_clean_set(clean_set(["a.png", "b.png", "a.png"]), tmp_path / "run")
    with pytest.raises(UnsafeInputError, match=r"'a\.png'") as caught:
        read_clean_set(path)
    assert len(str(caught.value).splitlines()) == 1
