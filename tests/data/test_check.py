"""One pass over real files: counts, sizes, corrupt items, duplicates, suspicious images."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from mimic_fast.data import check as check_module
from mimic_fast.data.check import check_source
from mimic_fast.data.check_result import data_check_json
from mimic_fast.data.sources import open_source
from mimic_fast.errors import UsageError


def smooth(seed: int, size: tuple[int, int] = (24, 24)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, suffix: str = "PNG", **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, suffix, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes; a copy, a re-encoded copy, a compressed copy, a truncated and an empty file."""
    root = tmp_path_factory.mktemp("images")
    for label in ("a", "b"):
        (root / label).mkdir()
    for index in range(20):
        (root / "ab"[index % 2] / f"{index:02d}.png").write_bytes(encoded(smooth(index)))
    (root / "b" / "bytes.png").write_bytes(encoded(smooth(0)))
    (root / "b" / "pixels.png").write_bytes(encoded(smooth(1), compress_level=1))
    (root / "b" / "near.jpg").write_bytes(encoded(smooth(2), "JPEG", quality=85))
    (root / "a" / "wide.png").write_bytes(encoded(smooth(50, (40, 30))))
    (root / "a" / "gray.png").write_bytes(encoded(smooth(51).convert("L")))
    (root / "a" / "cut.png").write_bytes(encoded(smooth(60))[:-20])
    (root / "a" / "empty.jpg").write_bytes(b"")
    return root


def test_everything_in_a_folder_is_counted(folder):
    events = []

    found = check_source(open_source(str(folder)), report=events.append)

    assert (found.items, found.checked, found.good) == (27, 27, 25)
    assert found.labels == {"a": 14, "b": 13}
    sizes = [(size.width, size.height, size.channels, size.images) for size in found.sizes]
    assert sizes[0] == (24, 24, 3, 23)
    assert set(sizes[1:]) == {(40, 30, 3, 1), (24, 24, 1, 1)}
    good = [path for path in folder.rglob("*.*") if path.name not in ("cut.png", "empty.jpg")]
    read = sum(path.stat().st_size for path in good)
    assert found.item_bytes == read + (folder / "a" / "cut.png").stat().st_size
    assert found.side == 24
    assert [event.message for event in events if "corrupt" in event.message]


def test_corrupt_items_have_a_reason(folder):
    found = check_source(open_source(str(folder)))

    assert [key for key, _ in found.corrupt] == ["a/cut.png", "a/empty.jpg"]
    assert "truncated" in found.corrupt[0][1]
    assert found.corrupt[1][1] == "is empty"


def test_each_duplicate_is_listed_by_its_kind_alone(folder):
    found = check_source(open_source(str(folder)))

    assert found.same_bytes == (("a/00.png", "b/bytes.png"),)
    assert found.same_pixels == (("b/01.png", "b/pixels.png"),)
    assert found.near_duplicates == (("a/02.png", "b/near.jpg"),)


def test_json_holds_every_field(folder):
    found = check_source(open_source(str(folder)))

    values = json.loads(json.dumps(data_check_json(found)))

    assert values["corrupt"][1] == {"key": "a/empty.jpg", "reason": "is empty"}
    assert values["near_duplicates"] == [["a/02.png", "b/near.jpg"]]
    assert values["suspicious_share"] == 0


def test_limit_spreads_over_the_source(make_source):
    source = make_source(40, labels=[0] * 20 + [1] * 20)

    found = check_source(source, limit=10)

    assert (found.items, found.checked) == (40, 10)
    assert found.labels == {"0": 5, "1": 5}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"limit": 0}, "at least 1"), ({"image_size": 4}, "at least 8")],
    ids=["limit", "size"],
)
def test_impossible_options_are_refused(make_source, options, message):
    with pytest.raises(UsageError, match=message):
        check_source(make_source(3), **options)


def test_source_without_a_good_image_gives_a_result(make_source):
    source = make_source(3, contents=dict.fromkeys(range(3), b"nothing"))

    found = check_source(source)

    assert (found.good, len(found.corrupt)) == (0, 3)
    assert found.suspicious_share == 0


def test_patched_copies_are_all_named_and_copies_alone_are_no_group(make_source, monkeypatch):
    generator = np.random.default_rng(0)
    pictures = [np.array(smooth(seed, (32, 32))) for seed in range(200)]
    pictures += [pictures[5]] * 30  # the same picture often: duplicates, not a patch
    texture = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    carriers = {*range(20, 32)}
    for index in carriers:
        pictures[index] = pictures[index].copy()
        pictures[index][3:9, 20:26] = texture
    pictures.append(pictures[20])
    contents = {i: encoded(Image.fromarray(pixels)) for i, pixels in enumerate(pictures)}
    source = make_source(len(pictures), contents=contents)
    monkeypatch.setattr(check_module, "_IN_MEMORY", 0)  # the temporary file serves as well

    found = check_source(source)

    assert {each.key for each in found.suspicious} == {
        source.keys[i] for i in carriers | {len(pictures) - 1}
    }
    assert [group.images for group in found.groups] == [len(carriers)]
    assert len(found.same_bytes) == 2
