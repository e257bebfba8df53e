"""``mimic-fast data check`` as users call it: table, JSON, file, exit codes."""

import json

import pytest


@pytest.fixture
def flawed(tmp_path, labeled):
    """Sixty images, one twice, and one that is none."""
    folder = tmp_path / "images"
    folder.mkdir()
    paths = sorted((labeled / "train").rglob("*.png"))[:60]
    for path in paths:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "copy [bold].png").write_bytes(paths[0].read_bytes())
    (folder / "bad.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a photograph")
    return folder


def test_json_and_file_hold_the_same(cli, tmp_path, flawed):
    done = cli("data", "check", flawed, "--json", "--out", "check.json")

    assert done.code == 0, done.err
    assert done.json == json.loads((tmp_path / "check.json").read_text())
    assert done.json["good"] == 61
    assert [item["key"] for item in done.json["corrupt"]] == ["bad.jpg"]
    assert "copy [bold].png" in done.json["same_bytes"][0]


def test_tables_name_what_is_wrong(cli, flawed):
    done = cli("data", "check", flawed)

    assert done.code == 0, done.err
    assert "bad.jpg" in done.out
    assert "copy [bold].png" in done.out
    assert "16 x 16 x 3" in done.out


@pytest.mark.parametrize(
    ("kind", "message"),
    [("corrupt", "1 corrupt items"), ("duplicates", "1 groups of duplicates")],
)
def test_fail_on_ends_with_exit_code_4_after_the_result(cli, flawed, kind, message):
    done = cli("data", "check", flawed, "--json", "--fail-on", kind)

    assert done.code == 4
    assert message in done.error
    assert done.json["good"] == 61


def test_fail_on_passes_where_there_is_none(cli, labeled):
    done = cli("data", "check", labeled / "train", "--limit", "40", "--fail-on", "corrupt")

    assert done.code == 0, done.err
    assert "40 checked" in done.out


def test_missing_source_is_one_line(cli):
    done = cli("data", "check", "nowhere")

    assert done.code == 2
    assert "nowhere" in done.error
