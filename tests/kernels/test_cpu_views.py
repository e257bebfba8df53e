import dataclasses
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mimic_fast.config import DataSettings
from mimic_fast.data.augment import apply_colors, apply_view, plain_view
from mimic_fast.data.view_parameters import ViewParameters, draw_view
from mimic_fast.kernels import cpu_build, cpu_views

BUILDS = {"native": (), "avx2": ("-mno-avx512f",), "portable": ("-DPORTABLE",)}
# Measured against the oracle in torch: 3e-7, float32 sums in another order.
GEOMETRY: dict[str, Any] = {"rtol": 0.0, "atol": 3e-6}
# Against float64: 4e-6 at 70 pixels. The oracle in torch places its filters in float32 too, and
# the last bit of a place near 64 is 8e-6 of a pixel.
PLACED: dict[str, Any] = {"rtol": 0.0, "atol": 1e-5}
# Measured: 2e-6. Factors of up to 2 widen a difference, sectors of the hue are as large as 13.
COLORS: dict[str, Any] = {"rtol": 0.0, "atol": 1e-5}
# Channels, side, size: registers filled and not, fewer and more pixels than outputs; beyond two
# registers of pixels, and beyond the image with most taps of a single output.
SHAPES = [(3, 32, 32), (3, 37, 32), (1, 32, 28), (1, 28, 28), (3, 24, 40), (3, 80, 6), (1, 9, 1)]
STILL = DataSettings(flip=0.5, jitter_probability=0.0, grayscale=0.0)
STRONG = DataSettings(jitter=(1.0, 1.0, 1.0, 0.5), jitter_probability=0.9, grayscale=0.3)


@pytest.fixture(scope="module", params=BUILDS)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    if request.param == "avx2" and " avx2 " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("needs a processor with AVX2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_build, "FLAGS", (*cpu_build.FLAGS, *BUILDS[request.param]))
        try:
            return cpu_build.load_library("cpu_views", tmp_path_factory.mktemp("built"))
        except cpu_build.NoCompilerError as error:
            pytest.skip(str(error))


def images(count: int, channels: int, side: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, channels, side, side)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def parameters(count: int, side: int, settings: DataSettings = STRONG) -> ViewParameters:
    return draw_view(torch.arange(count), side=side, settings=settings, seed=3, epoch=1, view=2)


def colors_of(drawn: ViewParameters) -> cpu_views.Colors:
    return cpu_views.Colors(
        jittered=drawn.jittered, amounts=drawn.amounts, order=drawn.order, gray=drawn.gray
    )


def view(
    pool: Tensor,
    rows: Tensor,
    drawn: ViewParameters,
    size: int,
    library,
    layout: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    out = torch.empty(len(rows), pool.shape[1], size, size, memory_format=layout)
    colors = colors_of(drawn)
    cpu_views.views(pool, rows, drawn.box, drawn.flip, colors, out, library=library)
    return out


def changed(crops: Tensor, drawn: ViewParameters, library) -> Tensor:
    result = crops.clone(memory_format=torch.preserve_format)
    cpu_views.change_colors(result, colors_of(drawn), library=library)
    return result


def colored(crops: Tensor, drawn: ViewParameters) -> Tensor:
    """The oracle in float64."""
    wide = dataclasses.replace(drawn, amounts=drawn.amounts.double())
    return apply_colors(crops.double(), wide)


def still(count: int, side: int, **changes: Any) -> ViewParameters:
    """The whole image as it is, but for ``changes``."""
    no = torch.zeros(count, dtype=torch.bool)
    whole = ViewParameters(
        box=torch.tensor([[0.0, 0.0, side, side]]).repeat(count, 1),
        flip=no,
        jittered=no,
        amounts=torch.zeros(count, 4),
        order=torch.arange(4).repeat(count, 1),
        gray=no,
    )
    return dataclasses.replace(whole, **changes)


def uncolored(drawn: ViewParameters) -> ViewParameters:
    no = torch.zeros_like(drawn.gray)
    return dataclasses.replace(drawn, jittered=no, gray=no)


def resized(image: Tensor, box: list[int], size: int) -> Tensor:
    """A crop by the definition of antialiased bilinear resizing, in float64."""

    def weights(start: int, length: int) -> Tensor:
        scale = length / size
        pixels = torch.arange(start, start + length).double() + 0.5
        centers = start + scale * (torch.arange(size).double() + 0.5)
        triangle = (1 - (pixels - centers[:, None]).abs() / max(scale, 1.0)).clamp(min=0)
        return triangle / triangle.sum(dim=1, keepdim=True)

    top, left, height, width = box
    crop = image[:, top : top + height, left : left + width].double() / 255
    return weights(top, height) @ crop @ weights(left, width).T


@pytest.mark.parametrize(("channels", "side", "size"), SHAPES, ids=str)
def test_crops_and_flips_equal_the_oracle(library, channels, side, size):
    pool, rows = images(20, channels, side), torch.arange(48) % 20
    drawn = parameters(48, side, STILL)

    found = view(pool, rows, drawn, size, library)

    torch.testing.assert_close(found, apply_view(pool[rows], drawn, image_size=size), **GEOMETRY)
    for result, row, box, flip in zip(found, rows, drawn.box, drawn.flip, strict=True):
        expected = resized(pool[row], box.int().tolist(), size)
        expected = expected.flip(2) if flip else expected
        torch.testing.assert_close(result.double(), expected, **PLACED)


@pytest.mark.parametrize(("channels", "side", "size"), SHAPES, ids=str)
def test_views_equal_the_oracle(library, channels, side, size):
    pool, rows = images(20, channels, side), torch.arange(96) % 20
    drawn = parameters(96, side)

    found = view(pool, rows, drawn, size, library)

    torch.testing.assert_close(found, apply_view(pool[rows], drawn, image_size=size), **COLORS)


def test_views_of_photographs_size_equal_the_oracle(library):
    pool, rows = images(3, 3, 256), torch.arange(12) % 3
    for settings, tolerance in ((STILL, GEOMETRY), (STRONG, COLORS)):
        drawn = parameters(12, 256, settings)

        found = view(pool, rows, drawn, 224, library)

        torch.testing.assert_close(
            found, apply_view(pool[rows], drawn, image_size=224), **tolerance
        )


@given(st.data())
def test_any_box_within_the_image_equals_the_definition(library, data):
    side, size = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    height, width = data.draw(st.integers(1, side)), data.draw(st.integers(1, side))
    top = data.draw(st.integers(0, side - height))
    left = data.draw(st.integers(0, side - width))
    flip = data.draw(st.booleans())
    pool = images(2, data.draw(st.sampled_from([1, 3])), side)
    box = [top, left, height, width]
    drawn = still(1, side, box=torch.tensor([box]).float(), flip=torch.tensor([flip]))

    found = view(pool, torch.tensor([1]), drawn, size, library)

    expected = resized(pool[1], box, size)
    expected = expected.flip(2) if flip else expected
    torch.testing.assert_close(found[0].double(), expected, **PLACED)
    expected = apply_view(pool[1:], drawn, image_size=size)
    torch.testing.assert_close(found, expected, **GEOMETRY)


@pytest.mark.parametrize("flip", [False, True])
def test_boxes_at_the_edges_and_one_pixel_boxes_read_their_pixels_alone(library, flip):
    side, size = 37, 32
    ends = [0, 18, 36]
    boxes = [[top, left, 1, 1] for top in ends for left in ends]
    boxes += [[top, 0, 1, side] for top in ends] + [[0, left, side, 1] for left in ends]
    for box in boxes:
        top, left, height, width = box
        pool = torch.full((1, 3, side, side), 255, dtype=torch.uint8)
        pool[:, :, top : top + height, left : left + width] = 10
        drawn = still(1, side, box=torch.tensor([box]).float(), flip=torch.tensor([flip]))

        found = view(pool, torch.tensor([0]), drawn, size, library)

        torch.testing.assert_close(found, torch.full_like(found, 10 / 255), rtol=1e-6, atol=0)


def test_whole_image_is_the_image_and_flipped_is_its_mirror(library):
    pool, rows = images(4, 3, 32), torch.arange(4)

    found = view(pool, rows, still(4, 32), 32, library)
    mirrored = view(pool, rows, still(4, 32, flip=torch.ones(4, dtype=torch.bool)), 32, library)

    assert torch.equal((found * 255).round().to(torch.uint8), pool)
    assert torch.equal(mirrored, found.flip(3))


@pytest.mark.parametrize("index", range(4), ids=["brightness", "contrast", "saturation", "hue"])
@pytest.mark.parametrize("share", [-1.0, -0.37, 0.0, 0.61, 1.0])
@pytest.mark.parametrize("channels", [1, 3])
def test_each_color_change_alone_equals_the_oracle(library, index, share, channels):
    crops = images(6, channels, 29).float() / 255
    crops[0], crops[1], crops[2] = 0.0, 1.0, 0.25  # no hue, no saturation, no contrast
    crops[3, :, :5] = crops[3, :1, :5]  # gray in part
    if channels == 3:
        crops[4, 1] = crops[4, 0]  # two channels are the highest, or the lowest
        crops[5, 2] = crops[5, 1]
    amounts = torch.zeros(6, 4)
    amounts[:, index] = share * (0.5 if index == 3 else 1.0)
    drawn = still(6, 29, jittered=torch.ones(6, dtype=torch.bool), amounts=amounts)

    found = changed(crops, drawn, library)

    torch.testing.assert_close(found.double(), colored(crops, drawn), **COLORS)
    if share == 0 or channels == 1 < index:
        assert torch.equal(found, crops)
    else:
        assert not torch.equal(found, crops)


def test_hues_beyond_half_a_turn_go_round(library):
    crops = images(5, 3, 29).float() / 255
    amounts = torch.zeros(5, 4)
    amounts[:, 3] = torch.tensor([0.8, -1.3, 2.25, -3.0, 7.49])
    drawn = still(5, 29, jittered=torch.ones(5, dtype=torch.bool), amounts=amounts)

    found = changed(crops, drawn, library)

    torch.testing.assert_close(found.double(), colored(crops, drawn), **COLORS)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_order_of_changes_equals_the_oracle(library, channels):
    orders = torch.tensor(list(permutations(range(4))))
    count = len(orders)
    crops = (images(1, channels, 21).float() / 255).repeat(count, 1, 1, 1)
    amounts = torch.tensor([[0.4, -0.7, 0.8, 0.21]]).repeat(count, 1)
    yes = torch.ones(count, dtype=torch.bool)
    drawn = still(count, 21, jittered=yes, amounts=amounts, order=orders)

    found = changed(crops, drawn, library)
    grayed = changed(crops, dataclasses.replace(drawn, gray=yes), library)

    torch.testing.assert_close(found.double(), colored(crops, drawn), **COLORS)
    expected = colored(crops, dataclasses.replace(drawn, gray=yes))
    torch.testing.assert_close(grayed.double(), expected, **COLORS)
    # the order matters: brightness and contrast alone tell two of them apart in gray
    assert len(found.flatten(1).unique(dim=0)) == (24 if channels == 3 else 2)


def test_only_what_was_drawn_changes(library):
    pool, rows = images(40, 3, 37), torch.arange(40)
    drawn = parameters(40, 37)
    quiet = ~drawn.jittered & ~drawn.gray
    crops = view(
        pool,
        rows,
        uncolored(drawn),
        32,
        library,
    )

    found = view(pool, rows, drawn, 32, library)

    same = (found == crops).flatten(1).all(dim=1)
    assert torch.equal(same, quiet)
    assert 0 < quiet.sum() < 40
    assert (found[drawn.gray] == found[drawn.gray][:, :1]).all()


@pytest.mark.parametrize(("channels", "side", "size"), [*SHAPES, (3, 256, 224)], ids=str)
def test_channels_last_has_the_bits_of_nchw(library, channels, side, size):
    count = 4 if side == 256 else 32
    pool, rows, drawn = images(count, channels, side), torch.arange(count), parameters(count, side)
    last = torch.channels_last

    found = view(pool, rows, drawn, size, library, last)
    crops = view(
        pool,
        rows,
        uncolored(drawn),
        size,
        library,
    )
    recolored = changed(crops.contiguous(memory_format=last), drawn, library)

    assert found.is_contiguous(memory_format=last)
    assert torch.equal(found, view(pool, rows, drawn, size, library))
    assert torch.equal(recolored, changed(crops, drawn, library))
    assert torch.equal(recolored, found)


@pytest.mark.parametrize(("channels", "side", "size"), [(3, 37, 32), (1, 28, 28)], ids=str)
def test_views_are_the_same_bits_anywhere_in_any_batch_for_any_threads(
    library, channels, side, size
):
    count = 30
    pool, drawn = images(count, channels, side), parameters(count, side)
    expected = view(pool, torch.arange(count), drawn, size, library)
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(0))

    def some(ids: Tensor) -> ViewParameters:
        fields = dataclasses.fields(drawn)
        return ViewParameters(**{f.name: getattr(drawn, f.name)[ids] for f in fields})

    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for batch in (1, 7, count):
                for ids in shuffled.split(batch):
                    found = view(pool, ids, some(ids), size, library)
                    assert torch.equal(found, expected[ids]), (threads, batch)
    finally:
        torch.set_num_threads(1)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's list of threads")
@pytest.mark.parametrize("threads", [1, 3])
def test_threads_are_torchs_in_whatever_thread_it_is_called(library, threads):
    # A loader works ahead in a thread of its own, for which OpenMP has a number of its own.
    pool, rows, drawn = images(6, 3, 24), torch.arange(6), parameters(6, 24)

    def started() -> int:
        before = len(list(Path("/proc/self/task").iterdir()))
        view(pool, rows, drawn, 16, library)
        return len(list(Path("/proc/self/task").iterdir())) - before

    torch.set_num_threads(threads)
    try:
        with ThreadPoolExecutor(max_workers=1) as executor:
            assert executor.submit(started).result() == threads - 1
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("channels", [1, 3])
def test_conversion_is_a_division_to_the_last_bit(library, channels):
    every = torch.arange(256, dtype=torch.uint8).repeat(9)
    pool = every.view(1, 1, 48, 48).repeat(3, channels, 1, 1)
    pool[1:] = images(2, channels, 48)
    rows = torch.tensor([2, 0, 0, 1])
    for layout in (torch.contiguous_format, torch.channels_last):
        out = torch.empty(4, channels, 40, 40, memory_format=layout)

        cpu_views.convert(pool[..., 4:44, 4:44], rows, None, out, library=library)

        assert torch.equal(out, plain_view(pool[rows], image_size=40))


def test_conversion_reads_any_strides_and_changes_colors(library):
    crops = images(8, 3, 19)
    drawn = parameters(8, 19)
    expected = changed(crops.float() / 255, drawn, library)
    for given_crops in (
        crops,
        crops.contiguous(memory_format=torch.channels_last),
        crops.flip(2).mT.contiguous().mT.flip(2),
    ):
        for layout in (torch.contiguous_format, torch.channels_last):
            out = torch.empty(8, 3, 19, 19, memory_format=layout)

            cpu_views.convert(given_crops, None, colors_of(drawn), out, library=library)

            assert torch.equal(out, expected)


def test_every_value_is_written_and_nothing_but_the_result(library, poisoned_memory):
    pool, rows, drawn = images(6, 3, 37), torch.arange(6), parameters(6, 37)
    kept = pool.clone()
    for layout in (torch.contiguous_format, torch.channels_last):
        around = torch.empty(8, 3, 33, 33, memory_format=layout)
        colors = colors_of(drawn)

        cpu_views.views(pool, rows, drawn.box, drawn.flip, colors, around[1:7], library=library)

        expected = apply_view(pool, drawn, image_size=33)
        torch.testing.assert_close(around[1:7], expected, **COLORS)
        assert around[0].isnan().all()
        assert around[7].isnan().all()
    assert torch.equal(pool, kept)


def test_strong_changes_stay_in_the_unit_interval(library):
    pool = images(64, 3, 24)
    pool[:2], pool[2:4] = 0, 255

    found = view(pool, torch.arange(64), parameters(64, 24), 32, library)

    assert found.isfinite().all()
    assert 0 <= found.min() <= found.max() <= 1


def test_an_empty_batch_is_empty(library):
    pool = images(2, 3, 24)
    rows = torch.arange(0)

    assert view(pool, rows, still(0, 24), 16, library).shape == (0, 3, 16, 16)
