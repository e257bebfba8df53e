"""The facade of views: which path runs, what it refuses, and that both paths give the same."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor

from mimic_fast import ops, ops_views
from mimic_fast.config import DataSettings
from mimic_fast.data.augment import apply_colors, apply_view, plain_view
from mimic_fast.data.view_parameters import ViewParameters, draw_view

CLOSE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-5}  # measured: 2e-6
LAYOUTS = {False: torch.contiguous_format, True: torch.channels_last}


@pytest.fixture
def unchecked():
    """Switches the type checks of the test run off: a user has none of them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def images(count: int = 5, channels: int = 3, side: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (count, channels, side, side)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def parameters(count: int, side: int = 20) -> ViewParameters:
    return draw_view(
        torch.arange(count), side=side, settings=DataSettings(), seed=0, epoch=0, view=1
    )


@pytest.mark.parametrize("path", ["reference", "cpp"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_path_gives_the_same_views(path, channels_last, channels, poisoned_memory):
    pool, rows, drawn = images(channels=channels), torch.tensor([4, 0, 0, 2]), parameters(4)
    before = ops.calls()

    with ops.force(path, op="views"):
        seen = ops_views.views(pool, rows, drawn, image_size=16, channels_last=channels_last)
        whole = ops_views.plain(pool, rows, image_size=16, channels_last=channels_last)
        floats = ops_views.from_crops(pool[rows], channels_last=channels_last)
        colored = ops_views.from_crops(pool[rows], drawn, channels_last=channels_last)

    crops = pool[rows].float() / 255
    torch.testing.assert_close(seen, apply_view(pool[rows], drawn, image_size=16), **CLOSE)
    torch.testing.assert_close(colored, apply_colors(crops, drawn), **CLOSE)
    assert torch.equal(whole, plain_view(pool[rows], image_size=16))
    assert torch.equal(floats, crops)
    for result in (seen, whole, floats, colored):
        assert result.is_contiguous(memory_format=LAYOUTS[channels_last])
    assert ops.calls() - before == {f"views/{path}": 4}


@pytest.mark.parametrize("path", ["reference", "cpp"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
def test_colors_change_crops_in_place(path, channels_last):
    drawn, layout = parameters(5), LAYOUTS[channels_last]
    crops = (images().float() / 255).contiguous(memory_format=layout)
    expected = apply_colors(crops, drawn)

    with ops.force(path, op="views"):
        result = ops_views.colors_(crops, drawn)

    assert result is crops
    torch.testing.assert_close(crops, expected, **CLOSE)


@pytest.mark.parametrize("path", ["reference", "cpp"])
def test_results_go_where_they_are_wanted(path):
    pool, rows, drawn = images(), torch.arange(5), parameters(5)
    for channels_last, layout in LAYOUTS.items():
        out = torch.empty(5, 3, 16, 16, memory_format=layout)
        keep: dict[str, Any] = {"channels_last": channels_last, "out": out}
        with ops.force(path, op="views"):
            assert ops_views.views(pool, rows, drawn, image_size=16, **keep) is out
            torch.testing.assert_close(out, apply_view(pool, drawn, image_size=16), **CLOSE)
            assert ops_views.plain(pool, rows, image_size=16, **keep) is out
            assert torch.equal(out, plain_view(pool, image_size=16))
            assert ops_views.from_crops(pool[..., 2:18, 2:18], **keep) is out
            assert torch.equal(out, plain_view(pool, image_size=16))


def test_crops_with_channels_last_in_memory_are_read_where_they_are():
    batch, drawn = images().permute(0, 2, 3, 1).contiguous(), parameters(5)

    found = ops_views.from_crops(batch.permute(0, 3, 1, 2), drawn)

    assert torch.equal(found, ops_views.from_crops(images(), drawn))


def test_a_pool_may_be_mapped_from_a_file(tmp_path):
    path, pool = tmp_path / "pool", images()
    path.write_bytes(pool.numpy().tobytes())
    mapped = torch.from_file(str(path), shared=False, size=pool.numel(), dtype=torch.uint8)
    rows, drawn = torch.tensor([4, 4, 1]), parameters(3)

    found = ops_views.views(mapped.view(pool.shape), rows, drawn, image_size=16)

    assert torch.equal(found, ops_views.views(pool, rows, drawn, image_size=16))


def test_parameters_of_other_dtypes_and_strides_are_the_same_parameters():
    pool, rows, drawn = images(), torch.arange(5), parameters(5)
    other = dataclasses.replace(
        drawn,
        box=drawn.box.double().T.contiguous().T,
        amounts=drawn.amounts.double(),
        order=drawn.order.int().T.contiguous().T,
        flip=drawn.flip.repeat_interleave(2)[::2],
    )
    scattered = rows.repeat_interleave(2)[::2]

    found = ops_views.views(pool, scattered, other, image_size=16)

    assert torch.equal(found, ops_views.views(pool, rows, drawn, image_size=16))


def test_empty_batches_are_empty():
    pool, rows = images(), torch.arange(0)

    assert ops_views.views(pool, rows, parameters(0), image_size=9).shape == (0, 3, 9, 9)
    assert ops_views.plain(pool, rows, image_size=9).shape == (0, 3, 9, 9)
    assert ops_views.from_crops(pool[:0]).shape == (0, 3, 20, 20)
    assert ops_views.colors_(torch.empty(0, 3, 4, 4), parameters(0)).shape == (0, 3, 4, 4)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("pool", "message"),
    [
        (images().float(), r"torch.uint8 images .* got torch.float32 \[5, 3, 20, 20\]"),
        (images(channels=2), r"\[B, 1 or 3, H, W\], got torch.uint8 \[5, 2, 20, 20\]"),
        (images()[0], r"got torch.uint8 \[3, 20, 20\]"),
        (images().mT, r"dense, got \[5, 3, 20, 20\] with strides \(1200, 400, 1, 20\)"),
        (images()[..., :18], r"squares that is dense, got \[5, 3, 20, 18\]"),
        (images()[:, :, :18].contiguous(), r"squares that is dense, got \[5, 3, 18, 20\]"),
    ],
    ids=["dtype", "channels", "dimensions", "strides", "cut", "sides"],
)
def test_pools_that_do_not_fit_are_refused(pool, message):
    for path in ("reference", "cpp"):
        with ops.force(path, op="views"):
            with pytest.raises(ValueError, match=message):
                ops_views.views(pool, torch.arange(5), parameters(5), image_size=16)
            with pytest.raises(ValueError, match=message):
                ops_views.plain(pool, torch.arange(5), image_size=16)


@pytest.mark.parametrize("rows", [[0, 5], [-1, 0], [2**40, 0]], ids=str)
def test_rows_outside_of_the_pool_are_refused_before_anything_is_written(rows):
    out = torch.full((2, 3, 16, 16), 7.0)
    message = rf"rows must lie in 0\.\.4, got {min(rows)}\.\.{max(rows)}"

    with pytest.raises(IndexError, match=message):
        ops_views.views(images(), torch.tensor(rows), parameters(2), image_size=16, out=out)
    with pytest.raises(IndexError, match=message):
        ops_views.plain(images(), torch.tensor(rows), image_size=16, out=out)

    assert (out == 7).all()


@pytest.mark.parametrize(
    "box",
    [
        [-1.0, 0, 5, 5],
        [0, 16, 5, 5],
        [0, 0, 21, 5],
        [0, 0, 0, 5],
        [0, 0, 5, -1],
        [0.5, 0, 5, 5],
        [0, 0, 5, 4.5],
        [float("nan"), 0, 5, 5],
        [0, 0, float("inf"), 5],
        [-1e30, 0, 1e30, 5],
    ],
    ids=str,
)
def test_boxes_that_are_not_whole_pixels_of_the_image_are_refused(box):
    drawn = dataclasses.replace(parameters(1), box=torch.tensor([box]).float())
    out = torch.full((1, 3, 16, 16), 7.0)

    with pytest.raises(ValueError, match=r"whole pixels within 20 x 20, got top, left, height"):
        ops_views.views(images(), torch.tensor([0]), drawn, image_size=16, out=out)

    assert (out == 7).all()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"box": torch.ones(4, 4)}, r"drawn.box \[5, 4\] on cpu, got \[4, 4\]"),
        ({"order": torch.zeros(5, 3).long()}, r"drawn.order \[5, 4\] on cpu, got \[5, 3\]"),
        ({"amounts": torch.zeros(5)}, r"drawn.amounts \[5, 4\] on cpu, got \[5\]"),
        ({"flip": torch.zeros(5)}, r"drawn.flip as torch.bool, got torch.float32"),
        ({"gray": torch.zeros(6).bool()}, r"drawn.gray \[5\] on cpu, got \[6\]"),
        ({"jittered": torch.zeros(5, device="meta").bool()}, r"on cpu, got \[5\] on meta"),
    ],
    ids=["box", "order", "amounts", "flip", "gray", "device"],
)
def test_parameters_that_do_not_fit_are_refused(changes, message):
    drawn = dataclasses.replace(parameters(5), **changes)

    with pytest.raises(ValueError, match=message):
        ops_views.views(images(), torch.arange(5), drawn, image_size=16)
    with pytest.raises(ValueError, match=message):
        ops_views.from_crops(images(), drawn)
    with pytest.raises(ValueError, match=message):
        ops_views.colors_(images().float(), drawn)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.empty(4, 3, 16, 16), r"\[5, 3, 16, 16\] torch.float32 on cpu, got \[4, 3"),
        (torch.empty(5, 3, 16, 16).double(), r"got \[5, 3, 16, 16\] torch.float64"),
        (torch.empty(5, 3, 16, 16).mT, r"dense in NCHW, got strides \(768, 256, 1, 16\)"),
    ],
    ids=["shape", "dtype", "strides"],
)
def test_a_place_for_the_result_that_does_not_fit_is_refused(out, message):
    with pytest.raises(ValueError, match=message):
        ops_views.views(images(), torch.arange(5), parameters(5), image_size=16, out=out)
    with pytest.raises(ValueError, match=message):
        ops_views.plain(images(), torch.arange(5), image_size=16, out=out)
    with pytest.raises(ValueError, match="dense in channels_last"):
        ops_views.plain(
            images(),
            torch.arange(5),
            image_size=16,
            channels_last=True,
            out=torch.empty(5, 3, 16, 16),
        )


@pytest.mark.usefixtures("unchecked")
def test_other_arguments_that_do_not_fit_are_refused():
    pool, rows = images(), torch.arange(5)
    with pytest.raises(ValueError, match=r"int64 rows \[B\] on cpu, got torch.int32 \[5\]"):
        ops_views.plain(pool, rows.int(), image_size=16)
    with pytest.raises(ValueError, match="images of 20 pixels are smaller than 21"):
        ops_views.plain(pool, rows, image_size=21)
    for size in (0, -3):
        with pytest.raises(ValueError, match=f"image_size must be at least 1, got {size}"):
            ops_views.plain(pool, rows, image_size=size)
        with pytest.raises(ValueError, match=f"image_size must be at least 1, got {size}"):
            ops_views.views(pool, rows, parameters(5), image_size=size)
    with pytest.raises(ValueError, match=r"dense in NCHW or channels_last, got strides"):
        ops_views.colors_(pool.float().mT, parameters(5))
    with pytest.raises(ValueError, match=r"torch.float32 images .* got torch.float64"):
        ops_views.colors_(pool.double(), parameters(5))
    with pytest.raises(ValueError, match=r"torch.uint8 images .* got torch.float32"):
        ops_views.from_crops(pool.float())


@pytest.mark.parametrize("path", ["triton", "compiled"])
def test_a_form_that_views_do_not_have_is_refused_with_the_alternatives(path):
    message = f"views are made by cpp on the CPU, or by reference, not by {path}"
    with ops.force(path, op="views"), pytest.raises(RuntimeError, match=message):
        ops_views.plain(images(), torch.arange(5), image_size=16)


def test_what_is_forced_for_a_run_leaves_views_alone():
    cpu = torch.device("cpu")
    usual = ops.choose("views", cpu)
    for path in ("reference", "cpp", "compiled"):
        with ops.force_for_run(path, cpu, torch.float32):
            assert ops.choose("views", cpu) == usual


def test_without_a_compiler_torch_makes_the_views_and_it_is_said_once(tmp_path: Path):
    code = (
        "import torch; from mimic_fast import ops, ops_views\n"
        "pool = torch.full((2, 3, 8, 8), 51, dtype=torch.uint8)\n"
        "for _ in range(3): found = ops_views.plain(pool, torch.tensor([1]), image_size=4)\n"
        "print(found.unique().tolist(), dict(ops.calls()))"
    )
    bare = {**os.environ, "PATH": str(tmp_path), "HOME": str(tmp_path)}

    done = subprocess.run(
        [sys.executable, "-c", code], env=bare, capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "[0.20000000298023224] {'views/reference': 3}"
    assert done.stderr.count("no C++ compiler") == 1
    assert "views runs on plain torch, slower" in done.stderr
