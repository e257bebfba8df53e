import hashlib
import json
from pathlib import Path

import pytest

from mimic_fast.errors import StoppedError, UnsafeInputError, UsageError
from mimic_fast.scan.references import References, complete, find
from mimic_fast.scan.result import Scanned, Score, read_scan, write_scan

FAMILY = {"architecture": "timm:resnet18"}
SCORE = Score(name="patch shift", value=0.2, unit="cosine", suspicious="high")


def scanned(content: str, **changes) -> Scanned:
    values = {
        "name": f"{content}.safetensors",
        "sha256": hashlib.sha256(content.encode()).hexdigest(),
        "family": FAMILY,
        "images": "images",
        "source": "source",
        "protocol": {"steps": 10},
        "scores": (SCORE,),
    }
    return Scanned.model_validate(values | changes)


SUSPECT = scanned("suspect")


def measured(path: Path) -> Scanned:
    return scanned(path.read_text())


def never(path: Path) -> Scanned:
    raise AssertionError(f"{path} was scanned")


def collect(folder: Path, wanted: Scanned, *, scan, family=lambda path: FAMILY) -> References:
    """Both steps, as a scan takes them before and after it measures."""
    found = find(folder, wanted.model_copy(update={"scores": ()}), family=family)
    complete(found, folder, wanted, scan=scan)
    return found


def put(path: Path, scan: Scanned) -> None:
    write_scan(path, scan, verdict=None, references=(), left_out={}, trigger=None)


def encoder(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def test_encoders_are_scanned_and_scans_are_read(tmp_path):
    encoder(tmp_path / "a.safetensors", "a")
    encoder(tmp_path / "deep" / "run" / "encoder.safetensors", "b")
    put(tmp_path / "done" / "scan.json", scanned("c"))

    found = collect(tmp_path, SUSPECT, scan=measured)

    assert sorted(one.name for one in found.used.values()) == [f"{n}.safetensors" for n in "abc"]
    assert not found.left_out


def test_each_encoder_counts_once_and_a_finished_scan_is_not_made_again(tmp_path):
    encoder(tmp_path / "a.safetensors", "a")
    encoder(tmp_path / "copy.safetensors", "a")
    put(tmp_path / "scan.json", scanned("a"))

    assert len(collect(tmp_path, SUSPECT, scan=never).used) == 1


def test_the_scanned_encoder_is_no_reference_of_itself(tmp_path):
    encoder(tmp_path / "a.safetensors", "suspect")
    put(tmp_path / "scan.json", SUSPECT)

    found = collect(tmp_path, SUSPECT, scan=never)

    assert not found.used
    assert "itself" in found.left_out["scan.json"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"family": {"architecture": "timm:resnet50"}}, "another architecture"),
        ({"protocol": {"steps": 11}}, "other settings"),
        ({"images": "others"}, "other images"),
    ],
)
def test_what_cannot_be_compared_is_left_out_with_the_reason(tmp_path, changes, reason):
    put(tmp_path / "x" / "scan.json", scanned("x", **changes))

    found = collect(tmp_path, SUSPECT, scan=never)

    assert not found.used
    assert reason in found.left_out["x/scan.json"]


def test_triggers_and_parts_are_no_encoders(tmp_path):
    encoder(tmp_path / "a.safetensors", "a")
    encoder(tmp_path / "trigger.safetensors", "t")
    encoder(tmp_path / "parts" / "probes.safetensors", "p")

    assert len(collect(tmp_path, SUSPECT, scan=measured).used) == 1


def test_one_damaged_encoder_does_not_cost_the_others(tmp_path):
    for name in "ab":
        encoder(tmp_path / f"{name}.safetensors", name)

    def scan(path: Path) -> Scanned:
        if path.name == "a.safetensors":
            raise UnsafeInputError("damaged")
        return measured(path)

    found = collect(tmp_path, SUSPECT, scan=scan)

    assert found.left_out == {"a.safetensors": "damaged"}
    assert len(found.used) == 1


def test_damage_is_found_before_anything_is_scanned(tmp_path):
    for name in ("a", "damaged", "other"):
        encoder(tmp_path / f"{name}.safetensors", name)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "scan.json").write_text("{")
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nowhere")

    def family(path: Path) -> dict[str, str]:
        if path.stem == "damaged":
            raise UnsafeInputError("is damaged")
        return {"architecture": "timm:resnet50"} if path.stem == "other" else FAMILY

    found = find(tmp_path, SUSPECT, family=family)

    assert [path.name for path in found.waiting.values()] == ["a.safetensors"]
    assert not found.used
    assert found.left_out.pop("gone.safetensors").startswith("cannot be read")
    assert found.left_out.pop("broken/scan.json").startswith("scan ")
    assert found.left_out == {
        "damaged.safetensors": "is damaged",
        "other.safetensors": "is of another architecture or input size",
    }


def test_a_reference_with_other_scores_is_left_out_by_name(tmp_path):
    other = SCORE.model_copy(update={"name": "another"})
    put(tmp_path / "scan.json", scanned("c", scores=(other,)))

    found = collect(tmp_path, SUSPECT, scan=never)

    assert not found.used
    assert found.left_out == {"c.safetensors": "has other scores"}


def test_a_signal_leaves(tmp_path):
    encoder(tmp_path / "a.safetensors", "a")

    def scan(path: Path) -> Scanned:
        raise StoppedError("stopped")

    with pytest.raises(StoppedError):
        collect(tmp_path, SUSPECT, scan=scan)


@pytest.mark.parametrize("name", ["missing", "empty", "file"])
def test_folder_without_references_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")

    with pytest.raises(UsageError, match="references"):
        collect(tmp_path / name, SUSPECT, scan=never)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": 1, "name": "x"}', "\x00", '{"scores": NaN}']
)
def test_what_is_no_scan_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "scan.json"
    path.write_text(text)

    with pytest.raises(UsageError) as caught:
        read_scan(path)

    assert "\n" not in str(caught.value)
    assert "scan.json" in str(caught.value)


def test_scores_that_are_not_finite_are_refused(tmp_path):
    path = tmp_path / "scan.json"
    put(path, SUSPECT)
    content = json.loads(path.read_text())
    content["scores"][0]["value"] = float("nan")
    path.write_text(json.dumps(content))

    with pytest.raises(UsageError, match="finite"):
        read_scan(path)


@pytest.mark.parametrize("value", ["0", "-0.1", "Infinity"])
def test_sizes_that_have_no_log_are_refused(tmp_path, value):
    path = tmp_path / "scan.json"
    size = Score(name="patch size at 0.95", value=0.5, unit="share", suspicious="low")
    put(path, scanned("a", scores=(size,)))
    path.write_text(path.read_text().replace('"value": 0.5', f'"value": {value}'))

    with pytest.raises(UsageError, match=r"scan\.json: scores\.0"):
        read_scan(path)


def test_a_scan_is_read_as_it_was_written(tmp_path):
    put(tmp_path / "scan.json", SUSPECT)

    assert read_scan(tmp_path / "scan.json") == SUSPECT
