"""attack.json: whole round trips, and what an attacker could write into it."""

import json

import pytest
import torch
from PIL import Image

from mimic_fast.errors import MachineError, UnsafeInputError, UsageError
from mimic_fast.evaluation.attack_file import (
    Attack,
    attack_files,
    read_attack,
    record_targets,
    refuse_other_targets,
    write_attack,
)
from mimic_fast.evaluation.triggers import white_patch


def make_attack(channels: int = 3, **changes) -> Attack:
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (channels, 16, 16), dtype=torch.uint8, generator=generator)
    given = {
        "kind": "badencoder",
        "trigger": white_patch(image_size=16, channels=channels),
        "reference": image,
        "targets": {"cifar10": 3},
        "facts": {"epochs": 20, "losses": [0.5, 0.25]},
    }
    return Attack(**(given | changes))


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a, b)


def edit(path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("by_folder", [False, True], ids=["file", "folder"])
def test_attack_survives_its_folder(tmp_path, channels, by_folder):
    attack = make_attack(channels)

    path = write_attack(tmp_path, attack)
    loaded = read_attack(tmp_path if by_folder else path)

    assert path == tmp_path / "attack.json"
    assert same(loaded.reference, attack.reference)
    assert torch.equal(loaded.trigger.mask, attack.trigger.mask)
    assert (loaded.kind, loaded.targets, loaded.facts) == (
        attack.kind,
        attack.targets,
        attack.facts,
    )


def test_attack_without_reference_survives_too(tmp_path):
    loaded = read_attack(write_attack(tmp_path, make_attack(reference=None)))

    assert loaded.reference is None
    assert not (tmp_path / "reference.png").exists()


def test_folder_can_be_moved(tmp_path):
    write_attack(tmp_path / "a", make_attack())
    (tmp_path / "a").rename(tmp_path / "b")

    assert read_attack(tmp_path / "b").kind == "badencoder"


@pytest.mark.parametrize("key", ["trigger", "reference"])
@pytest.mark.parametrize("how", ["parent", "absolute", "link", "null byte"])
def test_files_outside_the_folder_are_refused(tmp_path, key, how):
    write_attack(tmp_path / "other", make_attack())
    folder = tmp_path / "attack"
    path = write_attack(folder, make_attack())
    name = {"trigger": "trigger.safetensors", "reference": "reference.png"}[key]
    outside = tmp_path / "other" / name
    (folder / "link").symlink_to(outside)
    names = {
        "parent": f"../other/{name}",
        "absolute": str(outside),
        "link": "link",
        "null byte": "a\0b",
    }
    edit(path, **{key: names[how]})

    with pytest.raises(UnsafeInputError, match=r"attack\.json names"):
        read_attack(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "schema"),
        ({"kind": ""}, "kind"),
        ({"targets": {"cifar10": "3"}}, "targets.cifar10"),
        ({"targets": {"cifar10": -1}}, "targets must be class indices"),
        ({"command": "rm"}, "command"),
    ],
    ids=["schema", "kind", "text", "negative", "unknown"],
)
def test_content_that_does_not_fit_is_named(tmp_path, changes, message):
    path = write_attack(tmp_path, make_attack())
    edit(path, **changes)

    with pytest.raises(UsageError, match=message):
        read_attack(path)


def test_missing_and_malformed_files_are_usage_errors(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        read_attack(tmp_path / "absent.json")
    (tmp_path / "attack.json").write_text("{")
    with pytest.raises(UsageError, match="JSON"):
        read_attack(tmp_path)


def test_missing_reference_is_named(tmp_path):
    write_attack(tmp_path, make_attack())
    (tmp_path / "reference.png").unlink()

    with pytest.raises(UsageError, match=r"reference\.png does not exist"):
        read_attack(tmp_path)


def test_damaged_or_huge_reference_is_unsafe(tmp_path):
    write_attack(tmp_path, make_attack())
    picture = tmp_path / "reference.png"
    whole = picture.read_bytes()

    picture.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnsafeInputError, match="cannot be decoded"):
        read_attack(tmp_path)
    Image.new("L", (4000, 2000)).save(picture)
    with pytest.raises(UnsafeInputError, match="pixels"):
        read_attack(tmp_path)


def test_recorded_target_stands_and_new_ones_are_added(tmp_path):
    path = write_attack(tmp_path, make_attack())

    record_targets(path, {"cifar10": 7, "gtsrb": 12})

    loaded = read_attack(path)
    assert loaded.targets == {"cifar10": 3, "gtsrb": 12}
    assert loaded.facts == {"epochs": 20, "losses": [0.5, 0.25]}
    assert same(loaded.reference, make_attack().reference)


def test_recording_what_is_known_leaves_the_file_alone(tmp_path):
    path = write_attack(tmp_path, make_attack())
    before = path.stat().st_mtime_ns, path.stat().st_ino

    record_targets(path, {"cifar10": 7})

    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before


def test_reference_of_two_channels_is_refused(tmp_path):
    image = torch.zeros(2, 8, 8, dtype=torch.uint8)

    with pytest.raises(UsageError, match="1 or 3 channels, got 2"):
        write_attack(tmp_path, make_attack(reference=image))


def test_folder_that_cannot_be_written_is_the_machines_fault(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(MachineError, match="cannot write"):
        write_attack(tmp_path / "file" / "attack", make_attack())


@pytest.fixture
def several(tmp_path):
    """An attack with targets 2, 3 and 10, and what is none."""
    folder = tmp_path / "several"
    for name in (".", "target_10", "target_3", "target_2", "target_1", "target_02", "target_x"):
        write_attack(folder / name, make_attack())
    (folder / "target_4").mkdir()
    return folder


def test_folder_has_its_further_targets_in_order_and_a_file_none(several):
    further = [several / name / "attack.json" for name in ("target_2", "target_3", "target_10")]

    assert attack_files(several) == (several / "attack.json", *further)
    assert attack_files(several / "attack.json") == (several / "attack.json",)
    assert attack_files(several / "target_3") == (several / "target_3" / "attack.json",)


def test_target_that_is_a_link_out_of_the_folder_is_refused(several, tmp_path):
    write_attack(tmp_path / "outside", make_attack())
    (several / "target_5").symlink_to(tmp_path / "outside")

    with pytest.raises(UnsafeInputError, match=r"target_5/attack.json' outside its folder"):
        attack_files(several)


def test_folder_with_targets_of_an_earlier_attack_is_refused(several, tmp_path):
    with pytest.raises(UsageError, match="holds target_10 of an earlier attack"):
        refuse_other_targets(several, count=3)
    refuse_other_targets(several, count=10)
    refuse_other_targets(tmp_path / "none", count=1)
