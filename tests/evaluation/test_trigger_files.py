"""Trigger files are not trusted: whatever is in them is refused in one line, and nothing runs."""

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from mimic_fast.errors import UnsafeInputError, UsageError
from mimic_fast.evaluation.triggers import fit_trigger, load_trigger, named_trigger

SIDE = 8
MASK = np.ones((1, SIDE, SIDE), dtype=np.float32)
PATTERN = np.full((3, SIDE, SIDE), 0.25, dtype=np.float32)


def npz(path: Path, **arrays: object) -> Path:
    with path.open("wb") as file:
        np.savez(file, allow_pickle=True, **{"mask": MASK, "pattern": PATTERN, **arrays})
    return path


def safetensors(path: Path, **arrays: object) -> Path:
    values = {"mask": MASK, "pattern": PATTERN, **arrays}
    tensors = {name: torch.as_tensor(value).contiguous() for name, value in values.items()}
    path.write_bytes(save(tensors))
    return path


def png(side: int = SIDE, mode: str = "RGBA") -> bytes:
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, channels), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def whole(kind: str) -> bytes:
    """A file of the kind that is a trigger."""
    if kind == "png":
        return png()
    if kind == "safetensors":
        return save({"mask": torch.from_numpy(MASK), "pattern": torch.from_numpy(PATTERN)})
    buffer = io.BytesIO()
    methods = {"stored": zipfile.ZIP_STORED, "deflate": zipfile.ZIP_DEFLATED}
    methods |= {"bzip2": zipfile.ZIP_BZIP2, "lzma": zipfile.ZIP_LZMA}
    with zipfile.ZipFile(buffer, "w", methods[kind]) as archive:
        for name, array in (("mask", MASK), ("pattern", PATTERN)):
            member = io.BytesIO()
            np.save(member, array)
            archive.writestr(f"{name}.npy", member.getvalue())
    return buffer.getvalue()


KINDS = ("stored", "deflate", "bzip2", "lzma", "png", "safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read(tmp_path, kind):
    (tmp_path / "trigger").write_bytes(whole(kind))
    assert load_trigger(tmp_path / "trigger").pattern.shape == (3, SIDE, SIDE)


@pytest.mark.parametrize("kind", KINDS)
@given(
    changes=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6
    ),
    keep=st.floats(0.5, 1),
)
def test_damage_is_one_line_or_does_not_matter(tmp_path_factory, kind, changes, keep):
    data = bytearray(whole(kind))
    for place, value in changes:
        data[int(place * len(data))] = value
    path = tmp_path_factory.mktemp("damaged") / "trigger"
    path.write_bytes(data[: max(2, round(keep * len(data)))])

    try:
        trigger = load_trigger(path)
    except (UnsafeInputError, UsageError) as refused:
        said = str(refused)
    else:
        said = "a trigger"
        assert bool(((trigger.pattern >= -1) & (trigger.pattern <= 1)).all())
        assert bool(((trigger.mask >= 0) & (trigger.mask <= 1)).all())
    assert len(said.splitlines()) == 1
    assert "trigger" in said


def flags(data: bytes, *, encrypted: bool = False, method: int = 0, version: int = 20) -> bytes:
    """The archive with what is said of its first member changed, in both places."""
    changed = bytearray(data)
    for signature, at in ((b"PK\x03\x04", 4), (b"PK\x01\x02", 6)):
        start = changed.index(signature) + at
        changed[start] = version
        changed[start + 2] |= int(encrypted)
        changed[start + 4] = method
    return bytes(changed)


@pytest.mark.parametrize(
    "change", [{"encrypted": True}, {"method": 97}, {"version": 99}], ids=lambda c: next(iter(c))
)
def test_archives_that_cannot_be_opened_are_refused(tmp_path, change):
    (tmp_path / "t.npz").write_bytes(flags(whole("stored"), **change))

    with pytest.raises(UnsafeInputError, match=r"t\.npz is not a plain \.npz: \S"):
        load_trigger(tmp_path / "t.npz")


@pytest.mark.parametrize("kind", ["deflate", "lzma"])
def test_garbage_in_a_compressed_member_is_refused(tmp_path, kind):
    data = bytearray(whole(kind))
    data[50:80] = b"\xff" * 30
    (tmp_path / "t.npz").write_bytes(data)

    with pytest.raises(UnsafeInputError, match=r"is not a plain \.npz"):
        load_trigger(tmp_path / "t.npz")


@given(
    writer=st.sampled_from([npz, safetensors]),
    mask=st.lists(st.integers(0, 5), max_size=4),
    pattern=st.lists(st.integers(0, 5), max_size=4),
)
def test_arrays_of_any_shape_are_a_trigger_or_a_usage_error(
    tmp_path_factory, writer, mask, pattern
):
    arrays = {"mask": np.zeros(mask, np.float32), "pattern": np.zeros(pattern, np.float32)}
    path = writer(tmp_path_factory.mktemp("shapes") / "t", **arrays)
    planes = [shape if len(shape) == 3 else [1, *shape] for shape in (mask, pattern)]
    fits = all(len(shape) == 3 and 0 not in shape for shape in planes)

    if fits and planes[0] == [1, *planes[1][1:]]:
        assert load_trigger(path).pattern.shape == tuple(planes[1])
    else:
        with pytest.raises(UsageError, match=r"needs mask|is empty"):
            load_trigger(path)


@given(
    writer=st.sampled_from([npz, safetensors]),
    name=st.sampled_from(["mask", "pattern"]),
    value=st.sampled_from([np.nan, np.inf, -np.inf, 1.5, -1.5, 255.0, 1e300]),
    place=st.integers(0, SIDE * SIDE - 1),
    add=st.booleans(),
)
def test_one_value_out_of_range_is_a_usage_error(tmp_path_factory, writer, name, value, place, add):
    array = (MASK if name == "mask" else PATTERN).astype(np.float64)
    array.flat[place] = value
    path = writer(
        tmp_path_factory.mktemp("values") / "t", **{name: array, "add": np.array([add], np.float32)}
    )

    with pytest.raises(UsageError, match=f"{name} must lie in"):
        load_trigger(path)


@pytest.mark.parametrize(
    "pattern",
    [PATTERN.astype(np.complex64), PATTERN.astype(str), np.zeros(PATTERN.shape, "M8[s]")],
    ids=["complex", "text", "dates"],
)
def test_what_is_no_number_is_no_pattern(tmp_path, pattern):
    with pytest.raises(UsageError, match="'pattern' must hold numbers"):
        load_trigger(npz(tmp_path / "t.npz", pattern=pattern))


def test_complex_tensors_are_no_pattern(tmp_path):
    path = safetensors(tmp_path / "t", pattern=torch.zeros(PATTERN.shape, dtype=torch.complex64))
    with pytest.raises(UsageError, match="'pattern' must hold real numbers"):
        load_trigger(path)


@pytest.mark.parametrize("writer", [npz, safetensors])
@pytest.mark.parametrize("value", [[2.0], [np.nan], [0.0, 1.0], []])
def test_add_is_a_flag(tmp_path, writer, value):
    with pytest.raises(UsageError, match="'add' must be one number, 0 or 1"):
        load_trigger(writer(tmp_path / "t", add=np.array(value, dtype=np.float32)))


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("member", ["mask", "pattern", "add", "other"])
@pytest.mark.parametrize("raw", [False, True], ids=["object array", "raw pickle"])
def test_pickles_in_any_member_are_never_loaded(tmp_path, member, raw):
    struck, path = tmp_path / "struck", tmp_path / "t.npz"
    path.write_bytes(whole("stored"))
    inner = io.BytesIO(pickle.dumps(Payload(struck)))
    if not raw:
        np.save(inner := io.BytesIO(), np.array([Payload(struck)]), allow_pickle=True)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**members, f"{member}.npy": inner.getvalue()}.items():
            archive.writestr(name, data)

    if member == "other":  # not asked for, not read
        assert load_trigger(path).pattern.shape == (3, SIDE, SIDE)
    else:
        with pytest.raises(UnsafeInputError, match=r"is not a plain \.npz"):
            load_trigger(path)
    assert not struck.exists()


def test_archive_that_inflates_is_refused_before_it_does(tmp_path):
    head = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1, 8, 8)}"
    head += b" " * (117 - len(head)) + b"\n"
    with (
        zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("mask.npy", "w") as member,
    ):
        member.write(b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head)
        for _ in range(65):
            member.write(bytes(2**20))

    with pytest.raises(UnsafeInputError, match="claims"):
        load_trigger(tmp_path / "bomb.npz")


@pytest.mark.parametrize("name", ["t.npz", "t.png", "t.safetensors"])
def test_files_that_are_too_large_are_refused_unread(tmp_path, name):
    with (tmp_path / name).open("wb") as file:
        file.truncate(64 * 2**20 + 1)

    with pytest.raises(UnsafeInputError, match="give a smaller one"):
        load_trigger(tmp_path / name)


def test_pictures_with_too_many_pixels_are_refused_before_they_are_decoded(tmp_path):
    buffer = io.BytesIO()
    Image.new("1", (2049, 2048)).save(buffer, format="PNG")
    (tmp_path / "large.png").write_bytes(buffer.getvalue())

    with pytest.raises(UnsafeInputError, match="over 4194304 pixels"):
        load_trigger(tmp_path / "large.png")


@pytest.mark.parametrize(("own", "wanted"), [(2, 1), (2, 3), (3, 4), (5, 3)])
@pytest.mark.parametrize("writer", [npz, safetensors])
def test_channels_that_do_not_fit_the_encoder_are_a_usage_error(tmp_path, writer, own, wanted):
    path = writer(tmp_path / "t", pattern=np.zeros((own, SIDE, SIDE), np.float32))

    with pytest.raises(UsageError, match=f"{own} channels and the encoder takes {wanted}"):
        named_trigger(str(path), image_size=SIDE, channels=wanted)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_pictures_of_another_size_are_fitted(tmp_path, mode):
    (tmp_path / "t.png").write_bytes(png(13, mode))

    fitted = fit_trigger(load_trigger(tmp_path / "t.png"), image_size=SIDE, channels=3)

    assert fitted.pattern.shape == (3, SIDE, SIDE)
    assert 0 <= float(fitted.mask.min()) <= float(fitted.mask.max()) <= 1


def test_bytes_that_quote_a_terminal_are_shown_and_not_sent(tmp_path):
    path = tmp_path / "t"
    header = b'{"mask":{"dtype":"\x1b[31m\\n","shape":[1],"data_offsets":[0,4]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))

    with pytest.raises(UnsafeInputError) as caught:
        load_trigger(path)
    assert str(caught.value).isprintable()
