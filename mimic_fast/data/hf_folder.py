"""Hugging Face data sets saved on disk (``Dataset.save_to_disk``): Arrow files, mapped.

Data only. The format holds JSON and Arrow, no code; loading it unpickles nothing, runs no script
and asks no network. Images are never decoded by the library: an item is the bytes that are stored,
or the file inside the data set's folder that is named instead of them.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimic_fast.data.items import (
    DEFAULT_LIMITS,
    CorruptItemError,
    Limits,
    Source,
    check_size,
    decode_image,
    printable,
    read_whole,
)
from mimic_fast.errors import UnsafeInputError, UsageError

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from pyarrow import ChunkedArray

_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
_LABEL_COLUMNS = ("label", "labels")
# What thousands of mutated files made the library raise, and their close kin; Arrow's own are too.
_DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, MemoryError)


def is_hf_folder(path: Path) -> bool:
    """Whether a folder is what ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` writes."""
    one = (path / _STATE).is_file() and (path / _INFO).is_file()
    return one or (path / _SPLITS).is_file()


def hf_split(text: str) -> Path | None:
    """The folder of ``PATH:SPLIT``, if PATH is a saved data set of several splits.

    Raises:
        UsageError: If it is and has no such split.
        UnsafeInputError: If its list of splits is damaged.
    """
    root, _, split = text.rpartition(":")
    folder = Path(root).expanduser()
    if not root or not (folder / _SPLITS).is_file():
        return None
    splits = _splits(folder)
    if split not in splits:
        raise UsageError(f"data set {root!r} has no split {split!r}; have: {', '.join(splits)}")
    return folder / split


def open_hf_folder(path: Path, *, name: str, limits: Limits = DEFAULT_LIMITS) -> Source:
    """Opens a data set that was saved on disk.

    The images are the first column of type Image. Labels are the only column of type ClassLabel, or
    an integer column ``label`` or ``labels``; -1 and missing values are no label. Keys are the
    images' paths where every row has its own, ``row-00000012`` otherwise.

    Args:
        path: The folder, of one split.
        name: Recorded as the source's name.
        limits: What one image may take.

    Raises:
        UsageError: If the library is not installed, a split must be named, there is no image
            column, or labels are not given for every image.
        UnsafeInputError: If the data set is damaged, or names files outside its folder.
    """
    if not (path / _STATE).is_file():
        raise UsageError(
            f"data set {name!r} has several splits; give one of them: "
            f"{', '.join(f'{name}:{split}' for split in _splits(path))}"
        )
    with _damage(path):
        _check_files(path)
        dataset = _loaded(path)
        column = _image_column(dataset.features, path)
        label = _label_column(dataset.features)
        stored, paths = _mapped(dataset, column, label)
        labels, classes = _labels(dataset, label, path)
    return Source(
        name=name,
        keys=_keys(paths.to_pylist()),
        labels=labels,
        classes=classes,
        read=_reader(stored, paths, path.resolve(), limits),
        decode=partial(decode_image, limits=limits),
    )


def _splits(folder: Path) -> tuple[str, ...]:
    """The names of the splits, each a subfolder."""
    with _damage(folder):
        splits = json.loads((folder / _SPLITS).read_bytes())["splits"]
        for split in splits:
            _check_inside(split)
    return tuple(splits)


def _check_files(folder: Path) -> None:
    """Every Arrow file must lie in the folder: the library would map whatever is named."""
    files = json.loads((folder / _STATE).read_bytes())["_data_files"]
    if not files:
        raise UsageError(f"data set {folder} has no rows")
    for file in files:
        _check_inside(file["filename"])


def _check_inside(name: str) -> None:
    if not name or Path(name).name != name or name == "..":
        raise ValueError(f"{name[:100]!r} is no name of a file in its folder")


def _loaded(folder: Path) -> "Dataset":
    try:
        from datasets import Dataset, disable_progress_bars
    except ImportError:
        raise UsageError(
            "Hugging Face data sets need the library 'datasets'; "
            "install it with: pip install 'mimic_fast[hf]'"
        ) from None
    disable_progress_bars()  # it would draw its own where there are many files
    dataset = Dataset.load_from_disk(str(folder.resolve()), keep_in_memory=False)
    if len(dataset) == 0:
        raise UsageError(f"data set {folder} has no rows")
    return dataset


def _image_column(features: "Features", folder: Path) -> str:
    from datasets import Image

    for name, kind in features.items():
        if isinstance(kind, Image):
            return name
    have = ", ".join(f"{name} ({type(kind).__name__})" for name, kind in features.items())
    raise UsageError(f"data set {folder} has no column of type Image; have: {have}")


def _label_column(features: "Features") -> str | None:
    from datasets import ClassLabel, Value

    classes = [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
    if len(classes) == 1:
        return classes[0]
    for name in _LABEL_COLUMNS:
        kind = features.get(name)
        if name in classes or (isinstance(kind, Value) and "int" in str(kind.dtype)):
            return name
    return None


def _mapped(
    dataset: "Dataset", column: str, label: str | None
) -> tuple["ChunkedArray", "ChunkedArray"]:
    """The images' stored bytes and paths, where they lie in the mapped files.

    Arrow trusts offsets, and a damaged one would be read outside the map: hence the full check.
    """
    from datasets import Image

    dataset.data.table.select([column] if label is None else [column, label]).validate(full=True)
    images = dataset.with_format(None).select_columns([column])
    images = images.cast_column(column, Image(decode=False))
    stored, paths = images.data.table.column(column).flatten()
    return stored, paths


def _labels(
    dataset: "Dataset", column: str | None, folder: Path
) -> tuple[tuple[int, ...] | None, tuple[str, ...] | None]:
    from datasets import ClassLabel

    if column is None:
        return None, None
    values: list[int | None] = dataset.data.column(column).to_pylist()
    labels = tuple(value for value in values if value is not None and value >= 0)
    if not labels:
        return None, None
    if len(labels) < len(values):
        raise UsageError(
            f"{len(values) - len(labels)} of {len(values)} rows of data set {folder} have no "
            f"{column}; label every row or none"
        )
    feature = dataset.features[column]
    classes = tuple(feature.names) if isinstance(feature, ClassLabel) else None
    if classes is not None and max(labels) >= len(classes):
        raise ValueError(f"{column} {max(labels)} has no name among {len(classes)} classes")
    return labels, classes


def _keys(paths: list[str | None]) -> tuple[str, ...]:
    keys = tuple(printable(path) for path in paths if path)
    if len(set(keys)) == len(paths):
        return keys
    return tuple(f"row-{row:08d}" for row in range(len(paths)))


def _reader(
    stored: "ChunkedArray", paths: "ChunkedArray", folder: Path, limits: Limits
) -> Callable[[int], bytes]:
    """Reads the stored bytes of a row, or the file that it names."""

    def read(index: int) -> bytes:
        cell: Any = stored[index]
        if cell.is_valid:
            check_size(cell.as_buffer().size, limits)
            return cell.as_py()
        return read_whole(_inside(folder, paths[index].as_py()), limits)

    return read


def _inside(folder: Path, path: str | None) -> Path:
    """The file of a data set's folder that a row names.

    Raises:
        CorruptItemError: If it lies elsewhere, as a link may make it, or is no file.
    """
    try:
        resolved = (folder / (path or "")).resolve()
        found = resolved.is_file()
    except (OSError, ValueError, RuntimeError):  # a circle of links, a zero byte
        found, resolved = False, folder
    if not resolved.is_relative_to(folder):
        raise CorruptItemError("names a file outside its data set, which is not read")
    if not found:
        raise CorruptItemError("has no bytes, and no file in its data set")
    return resolved


@contextmanager
def _damage(folder: Path) -> Iterator[None]:
    """Turns whatever damaged JSON and Arrow make the libraries raise into one error."""
    try:
        yield
    except (UsageError, UnsafeInputError):
        raise
    except PermissionError as error:
        raise UsageError(f"data set {folder} cannot be read: {error.strerror}") from None
    except _DAMAGE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UnsafeInputError(f"data set {folder} is damaged: {reason}") from None
