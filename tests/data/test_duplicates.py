"""Equal digests, near duplicates against a search over all pairs, crowds of plain images."""

import io
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from mimic_fast.data import duplicates
from mimic_fast.data.duplicates import equal_groups, near_groups


def pictures(count: int, *, seed: int = 0, side: int = 32) -> Tensor:
    """Smooth random color images."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")
    return (255 * smooth).clamp(0, 255).to(torch.uint8)


def as_jpeg(image: Tensor, quality: int) -> Tensor:
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)


def test_equal_digests_are_grouped_in_order():
    assert equal_groups([b"a", b"b", b"a", b"c", b"b", b"a"]) == ((0, 2, 5), (1, 4))
    assert equal_groups([]) == ()


def test_different_pictures_are_no_duplicates():
    assert near_groups(pictures(300)) == ()


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images_have_no_duplicates(count):
    assert near_groups(pictures(max(count, 1))[:count]) == ()


def test_equal_pixels_are_near():
    images = pictures(20)

    assert near_groups(torch.cat([images, images[[3, 3, 7]]])) == ((3, 20, 21), (7, 22))


@pytest.mark.parametrize("quality", [70, 90])
def test_compression_brightness_and_contrast_leave_duplicates(quality):
    images = pictures(60)
    copies = [as_jpeg((image * 0.8 + 20).to(torch.uint8), quality) for image in images[:25]]

    groups = near_groups(torch.cat([images, torch.stack(copies)]))

    assert groups == tuple((i, 60 + i) for i in range(25))


def test_a_small_difference_in_the_picture_is_no_duplicate():
    image = pictures(1)
    other = image.clone()
    other[..., :12, :12] = 255 - other[..., :12, :12]

    assert near_groups(torch.cat([image, other])) == ()


def test_plain_images_are_one_group_in_bounded_time():
    plain = torch.full((4000, 3, 8, 8), 90, dtype=torch.uint8)

    assert near_groups(plain) == (tuple(range(4000)),)


@given(seed=st.integers(0, 10_000), steps=st.lists(st.integers(0, 12), min_size=2, max_size=30))
def test_candidates_hold_every_close_pair_once(seed, steps):
    base = pictures(4, seed=seed, side=8)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(steps), 3, 8, 8, generator=generator)
    chosen = base[torch.randint(0, 4, (len(steps),), generator=generator)].float()
    levels = torch.tensor(steps)[:, None, None, None]
    thumbs = duplicates._thumbs((chosen + levels * noise).clamp(0, 255).to(torch.uint8))

    pairs = [
        (min(a, b), max(a, b))
        for first, second in duplicates._candidates(thumbs)
        for a, b in zip(first.tolist(), second.tolist(), strict=True)
    ]

    close = {
        (a, b)
        for a, b in combinations(range(len(steps)), 2)
        if (thumbs[a] - thumbs[b]).square().mean().sqrt() <= duplicates._THUMB_LIMIT - 1e-3
    }
    assert close <= set(pairs)
    assert len(pairs) == len(set(pairs))
    assert all(a != b for a, b in pairs)
