"""Data is known by what it holds, not by where it lies or what it is called."""

import shutil
import tarfile
from pathlib import Path

import pytest

from mimic_fast.comparison.cells import cells_of
from mimic_fast.comparison.contents import source_digest
from mimic_fast.data.items import CorruptItemError, Source
from mimic_fast.data.sources import open_source
from mimic_fast.errors import StoppedError, UsageError
from mimic_fast.evaluation.attack_file import record_targets


@pytest.fixture
def ready(files: Path) -> Path:
    for name in ("first", "second"):
        record_targets(files / name, {"toy": 1})
    return files


@pytest.fixture
def digests(ready, matrix, tmp_path):
    """``digests(**changes)``: of all cells of the changed matrix."""
    return lambda **changes: [cell.digest for cell in cells_of(matrix(**changes), tmp_path / "out")]


def packed(folder: Path, shard: Path) -> None:
    """A tar shard of an image folder's images, labeled."""
    shard.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(shard, "w") as tar:
        for label, one in enumerate(sorted(folder.iterdir())):
            for image in sorted(one.iterdir()):
                text = shard.parent / "label"
                text.write_text(str(label))
                tar.add(image, f"{label}_{image.name}")
                tar.add(text, f"{label}_{image.stem}.cls")
                text.unlink()


def source(items: list[bytes], **changes) -> Source:
    keys = tuple(map(str, range(len(items))))

    def read(index: int) -> bytes:
        if items[index] == b"bad":
            raise CorruptItemError("cannot be read")
        return items[index]

    values = {"name": "x", "keys": keys, "labels": None, "classes": None, "read": read}
    return Source(**{**values, "decode": lambda _: pytest.fail("decoded"), **changes})


def test_other_images_under_the_same_names_are_another_cell(ready, values, digests):
    other = ready / "other" / "toy"
    shutil.copytree(ready / "toy", other)
    moved = {
        "data": {**values()["data"], "source": str(other / "train")},
        "evaluation": {
            "downstream": [
                {"name": "toy", "train": str(other / "train"), "test": str(other / "test")}
            ]
        },
    }
    base = digests()
    assert digests(**moved) == base  # the same images in another place

    image = other / "test" / "class_0" / "3.png"
    image.write_bytes((other / "test" / "class_0" / "4.png").read_bytes())

    assert not set(digests(**moved)) & set(base)


def test_shards_of_another_set_with_the_same_pattern_are_another_cell(ready, values, digests):
    packed(ready / "toy" / "train", ready / "cifar10" / "train-0.tar")
    packed(ready / "toy" / "test", ready / "gtsrb" / "train-0.tar")
    shutil.copytree(ready / "cifar10", ready / "moved" / "cifar10")

    def of(folder: str) -> list[str]:
        return digests(data={**values()["data"], "source": str(ready / folder / "train-*.tar")})

    assert not set(of("cifar10")) & set(of("gtsrb"))
    assert of("cifar10") == of("moved/cifar10")


def test_a_clean_set_is_known_by_its_bytes(ready, values, digests):
    def of(path: Path, text: str) -> list[str]:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return digests(data={**values()["data"], "clean_set": str(path)})

    base = of(ready / "a" / "clean_set.json", "1")
    assert of(ready / "b" / "clean_set.json", "1") == base
    assert not set(of(ready / "b" / "clean_set.json", "2")) & set(base)


def test_a_clean_set_that_is_not_there_is_refused(ready, values, digests):
    with pytest.raises(UsageError, match=r"clean_set .*gone.json does not exist"):
        digests(data={**values()["data"], "clean_set": str(ready / "gone.json")})


def test_every_source_is_opened_once_for_all_cells(ready, digests, monkeypatch):
    opened: list[str] = []

    def counted(text: str, **options):
        opened.append(text)
        return open_source(text, **options)

    monkeypatch.setattr("mimic_fast.comparison.contents.open_source", counted)
    assert len(digests()) == 6
    assert sorted(opened) == [str(ready / "toy" / "test"), str(ready / "toy" / "train")]


def test_digest_of_a_source_tells_keys_labels_bytes_and_unreadable_items_apart():
    different = [
        source([b"a", b"b"]),
        source([b"a", b"c"]),
        source([b"a", b"bad"]),
        source([b"a", b""]),
        source([b"ab", b""]),
        source([b"a", b"b"], keys=("0", "2")),
        source([b"a", b"b"], labels=(0, 1)),
        source([b"a", b"b"], labels=(0, 0)),
        source([b"a", b"b"], labels=(0, 1), classes=("x", "y")),
    ]
    assert len({source_digest(one) for one in different}) == len(different)
    assert source_digest(source([b"a"], name="here")) == source_digest(source([b"a"], name="there"))


def test_of_a_large_source_evenly_spread_items_are_read(monkeypatch):
    monkeypatch.setattr("mimic_fast.comparison.contents._READ", 4)
    read: list[int] = []

    def note(index: int) -> bytes:
        read.append(index)
        return b""

    source_digest(source([b""] * 11, read=note))
    assert read == [0, 3, 6, 9]


def test_reading_can_be_stopped():
    with pytest.raises(StoppedError):
        source_digest(source([b"a"]), stop=lambda: True)
