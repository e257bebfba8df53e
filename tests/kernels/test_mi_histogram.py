import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimic_fast.kernels import mi_histogram, mi_plan, reference

# The interpreter where there is no GPU, the compiled kernels under `make test-gpu`.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    *([pytest.mark.gpu] if DEVICE.type == "cuda" else []),
]
NATS = {
    "rtol": 0,
    "atol": 1e-6,
    "check_dtype": False,
}  # float32: 6e-7 at most over a million images
BINS = [2, 3, 4, 8, 12, 16, 24, 32, 64, 256]
ALL_BLOCKS = 2049  # images: one more than the largest block
PRODUCT_BLOCK = 128


def random_codes(*shape: int, bins: int, missing: float = 0.0, seed: int = 0) -> Tensor:
    """Codes below ``bins``; missing ones are 255 or, one in two, the first code that is no bin."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(bins, shape, generator=generator)
    if missing:
        assert bins < 256
        codes[torch.rand(shape, generator=generator) < missing / 2] = bins
        codes[torch.rand(shape, generator=generator) < missing / 2] = 255
    return codes.to(torch.uint8)


def pair_of_codes(rows: int, images: int, *, bins: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Dependent codes, some missing where 256 bins leave a code for that."""
    missing = 0.1 if bins < 256 else 0.0
    x = random_codes(rows, images, bins=bins, missing=missing, seed=seed)
    y = random_codes(rows, images, bins=bins, missing=missing, seed=seed + 1)
    same = torch.rand(rows, images, generator=torch.Generator().manual_seed(seed)) < 0.3
    return x, torch.where(same, x, y)


def bincount(x: Tensor, y: Tensor, bins: int) -> Tensor:
    """Joint counts of one pair, from torch.bincount alone."""
    x, y = x.long(), y.long()  # uint8 cannot be compared with 256
    cells = (x * bins + y)[(x < bins) & (y < bins)]
    return torch.bincount(cells, minlength=bins * bins).view(bins, bins).to(torch.int32)


def on_device(function, x: Tensor, y: Tensor, *others: Tensor, **keywords) -> Tensor:
    tensors = (tensor.to(DEVICE) for tensor in (x, y, *others))
    return function(*tensors, **keywords).cpu()


@pytest.mark.parametrize("bins", BINS)
@pytest.mark.parametrize("images", [1, 77, ALL_BLOCKS])
def test_matched_counts_are_those_of_bincount(bins, images):
    x, y = pair_of_codes(2, images, bins=bins)

    counts = on_device(mi_histogram.joint_histogram, x, y, bins=bins)

    expected = [bincount(*rows, bins) for rows in zip(x, y, strict=True)]
    assert torch.equal(counts, torch.stack(expected)[None, None])


@pytest.mark.parametrize("bins", BINS[:-1])
@pytest.mark.parametrize("images", [1, PRODUCT_BLOCK + 1])
def test_cross_counts_are_those_of_bincount(bins, images):
    x, _ = pair_of_codes(2, images, bins=bins)
    y, _ = pair_of_codes(3, images, bins=bins, seed=5)

    counts = on_device(mi_histogram.cross_histogram, x, y, bins=bins)

    expected = torch.stack([torch.stack([bincount(a, b, bins) for b in y]) for a in x])
    assert torch.equal(counts, expected[None])


@pytest.mark.parametrize(("bins", "first", "second"), [(3, 17, 2), (8, 3, 9), (16, 5, 9)])
def test_directions_that_do_not_fill_a_block_are_counted_alone(bins, first, second):
    x = random_codes(first, 20, bins=bins)
    y = random_codes(second, 20, bins=bins, seed=1)

    counts = on_device(mi_histogram.cross_histogram, x, y, bins=bins)
    nats = on_device(mi_histogram.cross_information, x, y, bins=bins)

    assert torch.equal(counts, reference.cross_histogram(x, y, bins=bins))
    torch.testing.assert_close(nats, reference.cross_information(x, y, bins=bins), **NATS)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 3), st.integers(0, 40), st.sampled_from([2, 5, 16, 17]), st.integers(0, 2**32)
)
def test_any_codes_are_counted_as_by_the_oracle(pairs, images, bins, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randint(256, (2, pairs, images), generator=generator).to(torch.uint8)
    x, y = (torch.where(codes < 200, codes % bins, codes) for codes in (x, y))
    groups = torch.randint(3, (images,), generator=generator)
    span = tuple(sorted(torch.randint(images + 1, (2,), generator=generator).tolist()))
    rolls = tuple(torch.randint(-50, 50, (2,), generator=generator).tolist())
    how = {"bins": bins, "num_groups": 3, "rolls": rolls, "images": span}

    counts = on_device(mi_histogram.joint_histogram, x, y, groups, **how)
    crossed = on_device(mi_histogram.cross_histogram, x, y[:2], bins=bins, rolls=rolls)

    assert torch.equal(counts, reference.joint_histogram(x, y, groups, **how))
    if pairs:  # the oracle stacks rows
        assert torch.equal(crossed, reference.cross_histogram(x, y[:2], bins=bins, rolls=rolls))


@pytest.mark.parametrize("bins", [4, 24, 64])
def test_groups_are_counted_apart_where_their_tables_fill_several_programs(bins):
    x, y = pair_of_codes(2, 300, bins=bins)
    groups = torch.arange(300) % 20

    counts = on_device(mi_histogram.joint_histogram, x, y, groups, bins=bins, num_groups=20)

    expected = reference.joint_histogram(x, y, groups, bins=bins, num_groups=20)
    assert torch.equal(counts, expected)


def test_images_without_groups_are_all_in_the_first():
    x, y = pair_of_codes(2, 30, bins=8)

    counts = on_device(mi_histogram.joint_histogram, x, y, bins=8, num_groups=3)

    assert torch.equal(counts, reference.joint_histogram(x, y, bins=8, num_groups=3))


def test_groups_out_of_range_are_not_counted():
    x = torch.zeros(1, 4, dtype=torch.uint8)
    groups = torch.tensor([0, -1, 2, 2**32])

    counts = on_device(mi_histogram.joint_histogram, x, x, groups, bins=2, num_groups=2)

    assert counts[0, :, 0, 0, 0].tolist() == [1, 0]
    assert int(counts.sum()) == 1


@pytest.mark.parametrize("bins", [16, 24], ids=["product", "pairs"])
@pytest.mark.parametrize("images", [48, 53], ids=["aligned", "ragged"])
def test_rolled_pairings_are_those_of_a_rolled_copy(bins, images):
    x, y = pair_of_codes(3, images, bins=bins)
    rolls = (0, 16, -32, 48) if images == 48 else (0, 1, 52, 53, 54, -3)

    matched = on_device(mi_histogram.joint_histogram, x, y, bins=bins, rolls=rolls)
    crossed = on_device(mi_histogram.cross_histogram, x, y, bins=bins, rolls=rolls)
    nats = on_device(mi_histogram.matched_information, x, y, bins=bins, rolls=rolls)
    crossed_nats = on_device(mi_histogram.cross_information, x, y, bins=bins, rolls=rolls)

    for i, roll in enumerate(rolls):
        rolled = y.roll(roll, 1)
        assert torch.equal(matched[i], reference.joint_histogram(x, rolled, bins=bins)[0])
        assert torch.equal(crossed[i], reference.cross_histogram(x, rolled, bins=bins)[0])
    torch.testing.assert_close(nats, reference.counted_information(matched[:, 0]), **NATS)
    torch.testing.assert_close(crossed_nats, reference.counted_information(crossed), **NATS)


@pytest.mark.parametrize("bins", BINS)
@pytest.mark.parametrize("images", [1, 77, 1000])
def test_information_is_that_of_the_counts(bins, images):
    x, y = pair_of_codes(2, images, bins=bins)
    expected = reference.matched_information(x, y, bins=bins)

    matched = on_device(mi_histogram.matched_information, x, y, bins=bins)

    assert matched.dtype == torch.float32
    torch.testing.assert_close(matched, expected, **NATS)
    if bins < 256 and images < 1000:
        crossed = on_device(mi_histogram.cross_information, x, y, bins=bins)
        torch.testing.assert_close(crossed[:, [0, 1], [0, 1]], expected, **NATS)


@pytest.mark.parametrize("bins", [4, 16, 24])
def test_information_of_special_columns_is_known(bins):
    even = (torch.arange(64 * bins) % bins).to(torch.uint8)
    constant = torch.full_like(even, bins - 1)
    missing = torch.full_like(even, 255)
    skewed = torch.where(torch.arange(64 * bins) == 5, 0, constant)
    x = torch.stack([even, even, constant, even, constant, skewed])
    y = torch.stack([even, constant, even, missing, constant, skewed])
    p = 1 / (64 * bins)
    binary_entropy = float(-(p * np.log(p) + (1 - p) * np.log1p(-p)))

    matched = on_device(mi_histogram.matched_information, x, y, bins=bins)
    crossed = on_device(mi_histogram.cross_information, x, y, bins=bins)

    known = torch.tensor([[np.log(bins), 0, 0, 0, 0, binary_entropy]])
    torch.testing.assert_close(matched, known, **NATS)
    torch.testing.assert_close(crossed.diagonal(dim1=1, dim2=2), known, **NATS)
    assert float(matched.min()) >= 0
    assert float(crossed.min()) >= 0


def test_information_of_many_images_keeps_its_precision():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 60_001, generator=generator)
    y = torch.stack([x[0], x[1] + 0.5 * torch.randn(60_001, generator=generator), x[1]])
    x, y = (reference.equal_mass_codes(values, bins=16) for values in (x, y))

    nats = on_device(mi_histogram.matched_information, x, y, bins=16)

    torch.testing.assert_close(nats, reference.matched_information(x, y, bins=16), **NATS)


def test_counts_in_one_cell_do_not_wrap_at_what_int8_or_int16_holds():
    x = torch.full((1, 33_000), 3, dtype=torch.uint8)

    matched = on_device(mi_histogram.joint_histogram, x, x, bins=4)
    crossed = on_device(mi_histogram.cross_histogram, x, x, bins=4)

    assert int(matched[0, 0, 0, 3, 3]) == int(crossed[0, 0, 0, 3, 3]) == 33_000


@pytest.mark.parametrize("bins", [8, 24])
def test_codes_in_any_memory_order_count_as_their_values(bins):
    x = random_codes(40, 3, bins=bins).mT
    y = random_codes(1, 60, bins=bins, seed=1)[:, 7:47].expand(3, 40)

    for name in ("joint_histogram", "cross_histogram"):
        counts = on_device(getattr(mi_histogram, name), x, y, bins=bins)

        assert torch.equal(counts, getattr(reference, name)(x, y, bins=bins))


@pytest.mark.parametrize("bins", [16, 24])
def test_nothing_to_count_gives_zeros_of_the_right_shape(bins):
    codes = torch.empty(2, 0, dtype=torch.uint8, device=DEVICE)

    counts = mi_histogram.joint_histogram(codes, codes, bins=bins, num_groups=3, rolls=(0, 1))
    crossed = mi_histogram.cross_histogram(codes, codes[:1], bins=bins)
    nats = mi_histogram.matched_information(codes, codes, bins=bins, rolls=(0, 1))
    crossed_nats = mi_histogram.cross_information(codes, codes[:0], bins=bins)

    assert counts.shape == (2, 3, 2, bins, bins)
    assert crossed.shape == (1, 2, 1, bins, bins)
    assert nats.shape == (2, 2)
    assert crossed_nats.shape == (1, 2, 0)
    assert not counts.any()
    assert not crossed.any()
    assert not nats.any()


@pytest.mark.parametrize(
    ("function", "bins", "plan"),
    [
        ("joint_histogram", 16, "plan_counts"),
        ("cross_histogram", 16, "plan_product"),
        ("cross_histogram", 24, "plan_counts"),
        ("matched_information", 16, "plan_information"),
        ("cross_information", 16, "plan_product"),
        ("cross_information", 24, "plan_information"),
    ],
)
def test_all_pairs_and_rolls_are_one_launch(function, bins, plan, monkeypatch):
    grids = []

    class Counting:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            grids.append(grid)
            return self.kernel[grid]

    def counting_plan(*arguments, **keywords):
        made = getattr(mi_plan, plan)(*arguments, **keywords)
        return dataclasses.replace(made, kernel=Counting(made.kernel))

    monkeypatch.setattr(mi_histogram, plan, counting_plan)
    x, y = pair_of_codes(2, 30, bins=bins)

    result = on_device(getattr(mi_histogram, function), x, y, bins=bins, rolls=(0, 3, 7))

    assert len(grids) == 1
    expected = getattr(reference, function)(x, y, bins=bins, rolls=(0, 3, 7))
    torch.testing.assert_close(result, expected, **NATS)


@pytest.mark.parametrize("bins", [16, 24])
def test_more_rolls_than_a_launch_takes_are_all_counted(bins, monkeypatch):
    monkeypatch.setattr(mi_histogram, "_ROLLS", 2)
    x, y = pair_of_codes(2, 30, bins=bins)
    how = {"bins": bins, "rolls": (0, 1, 2, 3, 4)}

    for name in ("joint_histogram", "cross_histogram", "matched_information", "cross_information"):
        result = on_device(getattr(mi_histogram, name), x, y, **how)

        torch.testing.assert_close(result, getattr(reference, name)(x, y, **how), **NATS)


@given(st.lists(st.integers(-(2**20), 2**20), min_size=1), st.integers(1, 5000))
def test_rolls_as_arguments_never_make_triton_compile_anew(rolls, images):
    packed = mi_histogram.packed_rolls(tuple(rolls), images)

    assert [value >> 2 for value in packed] == [roll % images for roll in rolls]
    assert all(value != 1 and value % 16 for value in packed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bins", "images"), [(4, 1), (16, 5000), (37, 4096), (255, 300)])
def test_edge_codes_are_those_of_the_oracle(dtype, bins, images):
    generator = torch.Generator().manual_seed(bins)
    values = torch.randn(2, images, generator=generator).to(dtype)
    edges = torch.randn(2, bins + 1, generator=generator).to(dtype).sort(dim=1).values
    values[:, : edges.shape[1]] = edges[:, :images]  # values on every edge
    values[0, images // 2] = torch.nan
    values[1, images // 2] = torch.inf

    codes = mi_histogram.edge_codes(values.to(DEVICE), edges.to(DEVICE)).cpu()

    assert torch.equal(codes, reference.edge_codes(values, edges))


def test_edge_codes_count_as_numpy_does():
    values = torch.tensor([[-0.1, 0.0, 0.5, 0.999, 1.0, 1.5, 2.0, 2.0, 2.1, np.nan]])
    edges = torch.tensor([[0.0, 1.0, 1.0, 2.0]])

    codes = mi_histogram.edge_codes(values.to(DEVICE), edges.to(DEVICE))[0].cpu()

    assert codes.tolist() == [255, 0, 0, 0, 2, 2, 2, 2, 255, 255]
    counts, _ = np.histogram(values[0], bins=edges[0])
    assert torch.bincount(codes[codes < 255].long()).tolist() == counts.tolist()


def test_strided_values_are_binned_as_their_values():
    values = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).mT
    edges = torch.linspace(-1, 1, 10).expand(2, 10)

    codes = mi_histogram.edge_codes(values.to(DEVICE), edges.to(DEVICE)).cpu()

    assert torch.equal(codes, reference.edge_codes(values.contiguous(), edges.contiguous()))


COMPILE = """
import dataclasses, json
from mimic_fast.kernels import aot, mi_histogram

cases = {case.name: case for case in mi_histogram.aot_cases()}
chosen = [cases[name] for name in (
    "mi information matched K16 R1", "mi counts matched K16 R1", "mi information cross K16 R1"
)]
# what the launcher makes of a single image: an argument that is 1 becomes a constant
case = cases["mi information matched K16 ragged"]
chosen.append(dataclasses.replace(
    case,
    name="one image",
    signature={**case.signature, "images": "constexpr", "x_stride": "constexpr"},
    constants={**case.constants, "images": 1, "x_stride": 1},
))
print(json.dumps([dataclasses.asdict(row) for row in aot.compile_all(chosen, ("sm_90",))]))
"""


@pytest.mark.skipif(DEVICE.type == "cuda", reason="kernels are compiled in this process")
def test_compiled_kernels_are_what_the_interpreter_cannot_show():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-4000:]
    rows = {row["case"]: row for row in json.loads(done.stdout)}
    assert not any(row["error"] for row in rows.values())
    assert not any(row["global_atomics"] for row in rows.values())
    for name in ("mi information matched K16 R1", "mi counts matched K16 R1"):
        assert rows[name]["loads"] == rows[name]["wide_loads"] > 0, name
    assert rows["mi information cross K16 R1"]["matrix"] == "IGMMA"
