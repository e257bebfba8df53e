import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mimic_fast.data.folder import find_files, open_folder
from mimic_fast.data.items import CorruptItemError
from mimic_fast.errors import UnsafeInputError, UsageError


def fill(folder: Path, names, content: bytes = b"x") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def test_folder_keys_are_sorted_relative_paths(tmp_path):
    fill(tmp_path, ["b/2.png", "b/10.png", "a/deep/er/1.JPG", "a/x.txt", "c/only.txt"])
    source = open_folder(tmp_path, name="data")
    assert source.name == "data"
    assert source.keys == ("a/deep/er/1.JPG", "b/10.png", "b/2.png")
    assert source.classes == ("a", "b")
    assert source.labels == (0, 1, 1)
    assert len(source) == 3


@pytest.mark.parametrize("names", [["1.png", "2.png"], ["1.png", "a/2.png"]])
def test_folder_images_without_class_folder_have_no_labels(tmp_path, names):
    fill(tmp_path, names)
    source = open_folder(tmp_path, name="data")
    assert source.labels is None
    assert source.classes is None


NAMES = st.lists(
    st.from_regex(r"[a-c]/[a-z0-9]{1,6}\.(png|jpg)", fullmatch=True),
    min_size=1,
    max_size=12,
    unique=True,
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(NAMES, st.randoms(use_true_random=False))
def test_folder_order_of_creation_does_not_matter(tmp_path_factory, names, random):
    first, second = (tmp_path_factory.mktemp("order") for _ in range(2))
    fill(first, names)
    random.shuffle(names)
    fill(second, names)
    one, two = (open_folder(folder, name="data") for folder in (first, second))
    assert (one.keys, one.labels, one.classes) == (two.keys, two.labels, two.classes)
    assert one.keys == tuple(sorted(names))


def test_folder_reads_and_decodes_its_files(tmp_path, encode_image):
    data = encode_image(3, size=(6, 4))
    fill(tmp_path, ["a/1.png"], data)
    source = open_folder(tmp_path, name="data")
    assert source.read(0) == data
    assert source.decode(source.read(0)).shape == (3, 4, 6)


def test_folder_hidden_entries_are_not_looked_at(tmp_path):
    fill(tmp_path, ["a/1.png", "a/._1.png", ".trash/2.png", ".3.png"])
    assert open_folder(tmp_path, name="data").keys == ("a/1.png",)


def test_folder_links_are_followed_but_not_in_circles(tmp_path):
    fill(tmp_path, ["data/a/1.png", "elsewhere/2.png"])
    (tmp_path / "data/a/up").symlink_to(tmp_path / "data")
    (tmp_path / "data/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/dangling.png").symlink_to(tmp_path / "nowhere.png")
    assert open_folder(tmp_path / "data", name="data").keys == ("a/1.png", "b/2.png", "c/2.png")


def test_folder_pipe_named_like_an_image_is_left_out(tmp_path):
    fill(tmp_path, ["1.png"])
    os.mkfifo(tmp_path / "0.png")
    assert open_folder(tmp_path, name="data").keys == ("1.png",)


def test_folder_name_that_is_not_utf8_gives_a_printable_key(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff.png"
    with open(path, "wb") as file:
        file.write(b"content")
    source = open_folder(tmp_path, name="data")
    assert source.keys == ("\\xff.png",)
    assert source.read(0) == b"content"


def test_folder_file_that_vanished_is_a_corrupt_item(tmp_path):
    fill(tmp_path, ["1.png"])
    source = open_folder(tmp_path, name="data")
    (tmp_path / "1.png").unlink()
    with pytest.raises(CorruptItemError, match="No such file"):
        source.read(0)


def test_folder_without_images_raises(tmp_path):
    fill(tmp_path, ["a/readme.txt"])
    with pytest.raises(UsageError, match="holds no image"):
        open_folder(tmp_path, name="data")
    with pytest.raises(UsageError, match="cannot be read"):
        open_folder(tmp_path / "absent", name="data")


def test_folder_keys_are_one_line_and_unique(tmp_path):
    fill(tmp_path, ["a\nb.png"])
    source = open_folder(tmp_path, name="data")
    assert source.keys == ("a\\nb.png",)
    assert source.read(0) == b"x"
    fill(tmp_path, ["a\\nb.png"])
    with pytest.raises(UnsafeInputError, match="two items of the key"):
        open_folder(tmp_path, name="data")


def test_find_files_by_suffix_in_any_case(tmp_path):
    fill(tmp_path, ["b.MP4", "a/c.mp4", "a/d.png", ".e.mp4", "mp4"])
    assert find_files(tmp_path, (".mp4",)) == ["a/c.mp4", "b.MP4"]
    assert find_files(tmp_path, (".avi",)) == []
