import io
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from mimic_fast.data import items
from mimic_fast.data.items import (
    HIGHEST_MAX_PIXELS,
    CorruptItemError,
    Limits,
    check_unique,
    decode_image,
    is_image_name,
    printable,
    read_range,
    read_whole,
    shortened,
)
from mimic_fast.errors import UnsafeInputError, UsageError


def saved(image: Image.Image, suffix: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, suffix, **options)
    return file.getvalue()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


COLOR = Image.fromarray(noise(10, 12, 3))
FILES = {
    "jpeg": saved(COLOR, "JPEG"),
    "progressive jpeg": saved(COLOR, "JPEG", progressive=True),
    "png": saved(COLOR, "PNG"),
    "palette png": saved(COLOR.quantize(8), "PNG", transparency=b"\x00\x10"),
    "webp": saved(COLOR, "WEBP"),
    "bmp": saved(COLOR, "BMP"),
    "ppm": saved(COLOR, "PPM"),
}


@pytest.mark.parametrize("suffix", ["PNG", "BMP", "PPM"])
def test_decode_color_gives_exact_rgb(suffix):
    decoded = decode_image(saved(COLOR, suffix))
    assert torch.equal(decoded, torch.from_numpy(np.array(COLOR)).permute(2, 0, 1))
    assert decoded.is_contiguous()


def test_decode_gray_gives_one_channel():
    pixels = noise(5, 7)
    decoded = decode_image(saved(Image.fromarray(pixels), "PNG"))
    assert torch.equal(decoded, torch.from_numpy(pixels)[None])
    assert decode_image(saved(Image.fromarray(pixels), "JPEG")).shape == (1, 5, 7)


def test_decode_sixteen_bit_gray_scales_to_eight():
    wide = np.array([[0, 128, 129, 257, 32896, 65535]], dtype=np.uint16)
    decoded = decode_image(saved(Image.fromarray(wide), "PNG"))
    assert decoded.tolist() == [[[0, 0, 1, 1, 128, 255]]]


def test_decode_transparency_drops_alpha():
    pixels = noise(4, 4, 4)
    decoded = decode_image(saved(Image.fromarray(pixels), "PNG"))
    assert torch.equal(decoded, torch.from_numpy(pixels[..., :3]).permute(2, 0, 1))


@pytest.mark.parametrize("mode", ["CMYK", "1", "P", "LA"])
def test_decode_other_modes_gives_one_or_three_channels(mode):
    suffix = "JPEG" if mode == "CMYK" else "PNG"
    decoded = decode_image(saved(COLOR.convert(mode), suffix))
    assert decoded.shape == ((1 if mode in ("1", "LA") else 3), 10, 12)


@pytest.mark.parametrize("name", FILES)
def test_decode_every_truncation_raises(name):
    data = FILES[name]
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    decode_image(data)
    for length in range(len(data)):
        with pytest.raises(CorruptItemError):
            decode_image(data[:length])


def test_decode_garbage_says_what_was_expected():
    with pytest.raises(CorruptItemError, match="is not a JPEG, PNG, WebP, BMP or PPM image"):
        decode_image(b"no image at all" * 10)
    with pytest.raises(CorruptItemError, match="is empty"):
        decode_image(b"")


@pytest.mark.parametrize("suffix", ["GIF", "TIFF", "ICO", "PDF", "EPS"])
def test_decode_format_outside_the_list_raises(suffix):
    with pytest.raises(CorruptItemError, match="is not a JPEG"):
        decode_image(saved(COLOR, suffix))


@given(st.binary(max_size=400))
def test_decode_random_bytes_raises_only_corrupt(data):
    with pytest.raises(CorruptItemError):
        decode_image(data)


@settings(max_examples=400)
@given(
    st.sampled_from(sorted(FILES)),
    st.lists(st.tuples(st.integers(0, 1199), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_decode_mutated_file_gives_pixels_or_corrupt(name, changes):
    data = bytearray(FILES[name])
    for at, value in changes:
        data[at % len(data)] = value
    try:
        decoded = decode_image(bytes(data))
    except CorruptItemError:
        return
    assert decoded.dtype == torch.uint8
    assert decoded.shape[0] in (1, 3)


@pytest.mark.parametrize("side", [8100, 60_000])
def test_decode_bomb_raises_before_it_is_unpacked(side):
    # A PNG header that claims the size, over a body that does not matter.
    data = bytearray(saved(COLOR, "PNG"))
    data[16:24] = side.to_bytes(4) * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4)
    with pytest.raises(CorruptItemError, match=r"pixels|decompression bomb"):
        decode_image(bytes(data))


def test_decode_odd_metadata_warns_nobody():
    exif = Image.Exif()
    exif[0x010E] = "x" * 50
    data = saved(COLOR, "JPEG", exif=exif)
    broken = data.replace(b"MM\0*\0\0\0\x08\0\x01", b"MM\0*\0\0\0\x08\0\xff")
    assert broken != data
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decode_image(broken)
    assert not caught


def test_corrupt_item_error_is_unsafe_input():
    assert issubclass(CorruptItemError, UnsafeInputError)
    assert CorruptItemError.exit_code == 4


def test_read_range_gives_the_bytes_of_the_range(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    assert read_range(path, 10, 5) == bytes(range(10, 15))
    assert read_whole(path) == bytes(range(100))


def test_read_range_beyond_the_end_raises(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    with pytest.raises(CorruptItemError, match="ends after 2 of 4 bytes"):
        read_range(path, 3, 4)


def test_read_missing_or_huge_file_raises(tmp_path):
    with pytest.raises(CorruptItemError, match="No such file"):
        read_whole(tmp_path / "absent.png")
    huge = tmp_path / "huge.png"
    with huge.open("wb") as file:
        file.truncate(items.MAX_ITEM_BYTES + 1)  # sparse: takes no space
    with pytest.raises(CorruptItemError, match="more than the"):
        read_whole(huge)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", True),
        ("A.JPEG", True),
        ("folder/b.png", True),
        (".hidden.png", False),
        ("folder/._b.png", False),
        ("a.gif", False),
        ("png", False),
        ("a.jpg.txt", False),
    ],
)
def test_is_image_name_by_suffix_and_not_hidden(name, expected):
    assert is_image_name(name) is expected


def test_printable_keeps_unicode_and_escapes_the_rest():
    assert printable("k\u00e4se/\u00fc.png") == "k\u00e4se/\u00fc.png"
    assert printable(b"a\xff.png".decode(errors="surrogateescape")) == "a\\xff.png"


@given(st.text(max_size=20))
def test_printable_is_one_line_of_text(name):
    text = printable(name.encode(errors="ignore").decode())
    assert len(text.splitlines()) <= 1
    assert "\x1b" not in text
    assert text.encode().decode() == text


def test_shortened_keeps_what_is_short():
    assert shortened("n" * 100) == "n" * 100
    assert shortened("n" * 101) == "n" * 100 + "..."


def test_check_unique_names_the_first_key_that_comes_again():
    check_unique(("a", "b", "c"), "data")
    with pytest.raises(UnsafeInputError, match="data holds two items of the key 'b'"):
        check_unique(("a", "b", "c", "b", "a"), "data")


def test_limits_replace_the_default_ones(tmp_path):
    data = saved(COLOR, "PNG")
    assert decode_image(data, Limits(max_pixels=120)).shape == (3, 10, 12)
    with pytest.raises(CorruptItemError, match="has 12 x 10 pixels, more than the 119 allowed"):
        decode_image(data, Limits(max_pixels=119))
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_whole(path, Limits(max_item_bytes=5)) == b"12345"
    with pytest.raises(CorruptItemError, match="has 5 bytes, more than the 4 allowed"):
        read_whole(path, Limits(max_item_bytes=4))


@pytest.mark.parametrize(
    "values", [{"max_pixels": 0}, {"max_item_bytes": 0}, {"max_pixels": HIGHEST_MAX_PIXELS + 1}]
)
def test_limits_that_cannot_hold_raise(values):
    with pytest.raises(UsageError, match="limits must be at least 1 byte and 1 pixel"):
        Limits(**values)
