import importlib.util
import json
import os
import random
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mimic_fast.config import DataSettings
from mimic_fast.data.clean_set import draw_clean_set
from mimic_fast.data.hf_folder import open_hf_folder
from mimic_fast.data.items import CorruptItemError, Limits
from mimic_fast.data.sources import open_source, open_split
from mimic_fast.errors import UnsafeInputError, UsageError

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="needs the library 'datasets'"
)

ARROW = "data-00000-of-00001.arrow"


def save(folder: Path, columns: dict[str, list], features: dict[str, Any], **options) -> Path:
    """Saves a data set as a user does."""
    from datasets import Dataset, Features, disable_progress_bars

    disable_progress_bars()
    dataset = Dataset.from_dict(columns, features=Features(features))
    dataset.save_to_disk(folder, **options)
    return folder


def save_raw(folder: Path, cells: list[dict | None]) -> Path:
    """Saves images as they are given: ``save_to_disk`` would put files' bytes into the rows."""
    import pyarrow as pa
    from datasets import Features, Image

    features = Features({"image": Image()})
    folder.mkdir(exist_ok=True)
    table = pa.table({"image": cells}, schema=features.arrow_schema)
    with pa.OSFile(str(folder / ARROW), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)
    state = {
        "_data_files": [{"filename": ARROW}],
        "_fingerprint": "0",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state))
    info = {"features": features.to_dict()}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory, encode_image) -> Callable[..., Path]:
    """A saved data set of five images, in two classes unless other features are given."""

    def make(label: Any = None, *, labels: list | None = None, **options) -> Path:
        from datasets import ClassLabel, Image

        cells = [{"bytes": encode_image(row), "path": f"{row}.png"} for row in range(5)]
        features = {"image": Image(), "label": label or ClassLabel(names=["cat", "dog"])}
        columns = {"image": cells, "label": labels or [0, 1, 1, 0, 1]}
        return save(tmp_path_factory.mktemp("saved") / "set", columns, features, **options)

    return make


@needs_library
def test_rows_are_the_stored_bytes_with_labels(saved, encode_image):
    folder = saved(num_shards=2)
    source = open_source(str(folder))
    assert source.name == str(folder)
    assert source.keys == ("0.png", "1.png", "2.png", "3.png", "4.png")
    assert (source.labels, source.classes) == ((0, 1, 1, 0, 1), ("cat", "dog"))
    assert [source.read(row) for row in range(5)] == [encode_image(row) for row in range(5)]
    assert source.decode(source.read(4)).shape == (3, 8, 8)
    assert source.encoded
    assert len(list(folder.glob("*.arrow"))) == 2


@needs_library
def test_clean_set_is_drawn_from_it(saved):
    settings = DataSettings(clean_fraction=1, allow_budget=True, stratified=True)
    clean_set = draw_clean_set(open_source(str(saved())), settings, seed=0)
    assert len(clean_set) == 5


@needs_library
def test_split_is_named_after_the_path(tmp_path, saved):
    from datasets import Dataset, DatasetDict

    folder = tmp_path / "both"
    one = Dataset.load_from_disk(saved())
    DatasetDict({"train": one, "test": one.select([3])}).save_to_disk(folder)  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert len(open_source(f"{folder}:train")) == 5
    assert open_source(f"{folder}:test").keys == ("3.png",)
    assert open_source(f"{folder}/test").keys == ("3.png",)
    assert len(open_split(str(folder), "test")) == 1
    with pytest.raises(
        UsageError, match=r"several splits; give one of them: .*both:train, .*:test"
    ):
        open_source(str(folder))
    with pytest.raises(UsageError, match="has no split 'valid'; have: train, test"):
        open_source(f"{folder}:valid")


@needs_library
@pytest.mark.parametrize("splits", ['["../one"]', '["/etc"]', '[".."]', "3", '{"a": 1}', "[[]]"])
def test_split_outside_the_folder_is_refused(tmp_path, saved, splits):
    shutil.copytree(saved(), tmp_path / "one")
    folder = tmp_path / "both"
    folder.mkdir()
    (folder / "dataset_dict.json").write_text(f'{{"splits": {splits}}}')
    for split in ("../one", "/etc", ".."):
        with pytest.raises((UnsafeInputError, UsageError)):
            open_source(f"{folder}:{split}")
    (folder / "dataset_dict.json").write_text('{"splits": ["../one"]}')
    with pytest.raises(UnsafeInputError, match=r"'\.\./one' is no name of a file in its folder"):
        open_source(f"{folder}:../one")


@needs_library
def test_labels_may_be_integers_or_absent(saved):
    from datasets import ClassLabel, Value

    source = open_hf_folder(saved(Value("int32")), name="data")
    assert (source.labels, source.classes) == ((0, 1, 1, 0, 1), None)
    for feature, labels in (
        (Value("string"), list("abcde")),
        (Value("float32"), [0.5] * 5),
        (ClassLabel(names=["cat"]), [-1] * 5),
        (Value("int64"), [None] * 5),
    ):
        source = open_hf_folder(saved(feature, labels=labels), name="data")
        assert (source.labels, source.classes) == (None, None)


@needs_library
@pytest.mark.parametrize("missing", [-1, None])
def test_labels_of_some_rows_only_raise(saved, missing):
    with pytest.raises(UsageError, match=r"1 of 5 rows of data set .* have no label; label every"):
        open_hf_folder(saved(labels=[0, 1, missing, 1, 0]), name="data")


@needs_library
def test_label_column_is_the_only_class_label(tmp_path, encode_image):
    from datasets import ClassLabel, Image, Value

    columns: dict[str, list] = {
        "label": [7, 8],
        "fine": [0, 1],
        "photo": [{"bytes": encode_image(row), "path": None} for row in range(2)],
        "mask": [{"bytes": b"mask", "path": None}] * 2,
    }
    features = {
        "label": Value("int64"),
        "fine": ClassLabel(names=["a", "b"]),
        "photo": Image(),
        "mask": Image(),
    }
    source = open_hf_folder(save(tmp_path / "one", columns, features), name="data")
    assert (source.labels, source.classes) == ((0, 1), ("a", "b"))
    assert source.read(1) == encode_image(1)
    columns["coarse"], features["coarse"] = [1, 1], ClassLabel(names=["c", "d"])
    source = open_hf_folder(save(tmp_path / "two", columns, features), name="data")
    assert (source.labels, source.classes) == ((7, 8), None)


@needs_library
def test_keys_are_row_numbers_where_paths_do_not_tell_rows_apart(tmp_path):
    for paths in ([None, None], ["a.png", "a.png"], ["a.png", None]):
        cells: list = [{"bytes": b"x", "path": path} for path in paths]
        source = open_hf_folder(save_raw(tmp_path / "set", cells), name="data")
        assert source.keys == ("row-00000000", "row-00000001")
        shutil.rmtree(tmp_path / "set")


@needs_library
def test_without_images_or_rows_raises(tmp_path):
    from datasets import Image, Value

    texts = save(tmp_path / "texts", {"text": ["x"]}, {"text": Value("string")})
    with pytest.raises(UsageError, match=r"has no column of type Image; have: text \(Value\)"):
        open_source(str(texts))
    empty = save(tmp_path / "empty", {"image": []}, {"image": Image()})
    with pytest.raises(UsageError, match="has no rows"):
        open_source(str(empty))


@needs_library
def test_limits_hold(saved, encode_image):
    size = len(encode_image(0))
    with pytest.raises(CorruptItemError, match=f"has {size} bytes, more than the {size - 1}"):
        open_source(str(saved()), limits=Limits(max_item_bytes=size - 1)).read(0)
    source = open_source(str(saved()), limits=Limits(max_pixels=63))
    with pytest.raises(CorruptItemError, match="more than the 63 allowed"):
        source.decode(source.read(0))


@needs_library
def test_rows_that_name_files_read_only_inside_the_folder(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"secret")
    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    (folder / "images/1.png").write_bytes(b"one")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "loop.png").symlink_to("loop.png")
    os.mkfifo(folder / "pipe.png")
    outside = ["../secret.png", str(tmp_path / "secret.png"), "link.png", "images/../../secret.png"]
    absent = ["gone.png", "images", "pipe.png", "loop.png", "a\0b.png", "http://x.org/1.png", ""]
    cells: list = [{"bytes": None, "path": path} for path in ["images/1.png", *outside, *absent]]
    source = open_hf_folder(save_raw(folder, [*cells, None]), name="data")
    assert source.read(0) == b"one"
    for row in range(1, 1 + len(outside)):
        with pytest.raises(CorruptItemError, match="names a file outside its data set"):
            source.read(row)
    for row in range(1 + len(outside), len(source)):
        with pytest.raises(CorruptItemError, match="has no bytes, and no file in its data set"):
            source.read(row)


@needs_library
@pytest.mark.parametrize("name", ["../other.arrow", "/etc/passwd", "..", "", "a/../b"])
def test_data_file_outside_the_folder_is_refused(saved, name):
    folder = saved()
    shutil.copy(folder / ARROW, folder.parent / "other.arrow")
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"] = [{"filename": name}]
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(UnsafeInputError, match="is no name of a file in its folder"):
        open_source(str(folder))


@needs_library
def test_nothing_is_unpickled_written_or_asked_of_a_network(tmp_path, saved, monkeypatch):
    folder = saved()
    open_source(str(folder))  # imports what it needs
    seen: list[str] = []
    watching = [True]

    def watch(event: str, arguments: tuple) -> None:
        if watching and event in ("pickle.find_class", "subprocess.Popen"):
            seen.append(event)
        if watching and event == "open" and isinstance(arguments[1], str):
            seen.extend(arguments[1] for letter in "wax+" if letter in arguments[1])

    def connect(*arguments: object) -> None:
        raise AssertionError(f"connects to {arguments}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    sys.addaudithook(watch)
    try:
        source = open_source(str(folder))
        assert len([source.read(row) for row in range(5)]) == 5
    finally:
        watching.clear()
    assert seen == []
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@needs_library
@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", ARROW])
def test_mutated_files_are_read_or_refused_in_one_line(tmp_path, saved, name):
    whole = {path.name: path.read_bytes() for path in saved().iterdir()}
    kinds = set()
    for seed in range(60):
        generator = random.Random(seed)
        data = bytearray(whole[name])
        for _ in range(generator.randint(1, 4)):
            data[generator.randrange(len(data))] = generator.choice([0, 34, 57, 128, 255])
        if seed % 4 == 0:
            del data[generator.randrange(len(data)) :]
        folder = tmp_path / str(seed)
        folder.mkdir()
        for other, content in whole.items():
            (folder / other).write_bytes(bytes(data) if other == name else content)
        kinds.add(outcome(folder))
    assert kinds >= {"UnsafeInputError"}
    assert kinds <= {"UnsafeInputError", "UsageError", "read"}


def outcome(folder: Path) -> str:
    try:
        source = open_hf_folder(folder, name="data")
    except (UnsafeInputError, UsageError) as error:
        return type(error).__name__ if len(str(error).splitlines()) == 1 else "lines"
    for row in range(len(source)):
        try:
            source.decode(source.read(row))
        except CorruptItemError as error:
            if len(str(error).splitlines()) != 1:
                return "lines"
    return "read"


def test_missing_library_is_said_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "a.arrow"}]}')
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(UsageError, match=r"pip install 'mimic_fast\[hf\]'"):
        open_source(str(tmp_path))
