import ctypes
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mimic_fast.kernels import cpu_build, cpu_histogram, reference

NATS = {"rtol": 0, "atol": 1e-9}  # sums in another order differ by 1e-14
BINS = [2, 4, 8, 16, 17, 32, 64, 256]
BUILDS = {"native": (), "avx2": ("-mno-avx512f", "-mno-avx512bw"), "portable": ("-DPORTABLE",)}
EXTREMES = [-math.inf, -1e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1e-7, 1.0, 1.5, 1e38, math.inf]


@pytest.fixture(scope="module", params=BUILDS)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    if request.param == "avx2" and " avx2 " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("needs a processor with AVX2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_build, "FLAGS", (*cpu_build.FLAGS, *BUILDS[request.param]))
        try:
            return cpu_build.load_library("cpu_histogram", tmp_path_factory.mktemp("built"))
        except cpu_build.NoCompilerError as error:
            pytest.skip(str(error))


@st.composite
def codes(draw: st.DrawFn, *, rows: int, images: int, bins: int) -> Tensor:
    """Random codes; some are missing, some rows constant."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    drawn = torch.randint(bins, (rows, images), generator=generator)
    if draw(st.booleans()):
        drawn[torch.rand(rows, generator=generator) < 0.3] = bins - 1
    if draw(st.booleans()):
        missing = torch.rand(rows, images, generator=generator) < 0.2
        drawn[missing] = draw(st.sampled_from([bins, 255]))
    return drawn.to(torch.uint8)


def random_codes(*shape: int, bins: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(bins, shape, generator=generator, dtype=torch.uint8)


def assert_cross_is_right(x: Tensor, y: Tensor, bins: int, rolls: tuple[int, ...], library) -> None:
    counts = cpu_histogram.cross_histogram(x, y, bins=bins, rolls=rolls, library=library)
    nats = cpu_histogram.cross_information(x, y, bins=bins, rolls=rolls, library=library)

    # a row of x against all of y is a matched problem, which the oracle solves in one go
    expected = [
        reference.joint_histogram(row.expand_as(y), y, bins=bins, rolls=rolls)[:, 0] for row in x
    ]
    assert torch.equal(counts, torch.stack(expected, dim=1) if expected else counts)
    torch.testing.assert_close(nats, reference.counted_information(counts), **NATS)


@given(st.data(), st.sampled_from(BINS), st.integers(0, 5), st.integers(0, 1100))
def test_matched_pairs_equal_the_oracle(library, data, bins, pairs, images):
    x = data.draw(codes(rows=pairs, images=images, bins=bins))
    y = data.draw(codes(rows=pairs, images=images, bins=bins))
    rolls = tuple(data.draw(st.lists(st.integers(-3000, 3000), min_size=1, max_size=3)))

    counts = cpu_histogram.joint_histogram(x, y, bins=bins, rolls=rolls, library=library)
    nats = cpu_histogram.matched_information(x, y, bins=bins, rolls=rolls, library=library)

    assert torch.equal(counts, reference.joint_histogram(x, y, bins=bins, rolls=rolls))
    expected = reference.matched_information(x, y, bins=bins, rolls=rolls)
    torch.testing.assert_close(nats, expected, **NATS)


@given(st.data(), st.sampled_from(BINS), st.integers(0, 600), st.integers(1, 7))
def test_groups_of_a_share_of_the_images_equal_the_oracle(library, data, bins, images, groups):
    x = data.draw(codes(rows=2, images=images, bins=bins))
    y = data.draw(codes(rows=2, images=images, bins=bins))
    group = torch.arange(images) * 7 % groups if data.draw(st.booleans()) else None
    share = data.draw(st.tuples(st.integers(0, images), st.integers(0, images)))
    rolls = (0, data.draw(st.integers(0, 600)))
    arguments = (x, y, group)
    settings = {"bins": bins, "num_groups": groups, "rolls": rolls, "images": share}

    counts = cpu_histogram.joint_histogram(*arguments, **settings, library=library)

    assert torch.equal(counts, reference.joint_histogram(*arguments, **settings))


def test_images_of_no_group_are_not_counted(library):
    x = random_codes(3, 1000, bins=8)
    group = torch.arange(1000) % 6 - 2
    own = (group >= 0) & (group < 3)

    counts = cpu_histogram.joint_histogram(x, x, group, bins=8, num_groups=3, library=library)

    expected = reference.joint_histogram(x[:, own], x[:, own], group[own], bins=8, num_groups=3)
    assert torch.equal(counts, expected)


@given(st.data(), st.sampled_from(BINS), st.integers(0, 70), st.integers(0, 3), st.integers(0, 300))
def test_cross_pairs_equal_the_oracle(library, data, bins, rows, others, images):
    rows = min(rows, 3) if bins > 32 else rows
    x = data.draw(codes(rows=rows, images=images, bins=bins))
    y = data.draw(codes(rows=others, images=images, bins=bins))
    rolls = (0, data.draw(st.integers(-1000, 1000)))

    assert_cross_is_right(x, y, bins, rolls, library)


@pytest.mark.parametrize("images", [255, 256, 2048, 4096, 4097, 9001])
@pytest.mark.parametrize("bins", [2, 4, 5, 8, 9, 12, 13, 16])
def test_many_images_and_partners_equal_the_oracle(library, bins, images):
    # more than the images of a tile, the counters of a byte, the partners of a task
    x = random_codes(3, images, bins=bins)
    x[1] = bins - 1
    y = random_codes(7, images, bins=bins, seed=1)
    y[2] = 0

    assert_cross_is_right(x, y, bins, (0, 1, images // 2), library)


@pytest.mark.parametrize("bins", [2, 16, 17])
def test_counts_beyond_the_table_of_logarithms_equal_the_oracle(library, bins):
    x = (random_codes(2, 70_000, bins=100) == 0).to(torch.uint8)
    y = (random_codes(2, 70_000, bins=50, seed=1) == 0).to(torch.uint8)
    y[1] = x[0]

    assert_cross_is_right(x, y, bins, (0, 3), library)
    nats = cpu_histogram.matched_information(x, y, bins=bins, library=library)
    torch.testing.assert_close(nats, reference.matched_information(x, y, bins=bins), **NATS)


@pytest.mark.parametrize("bins", [2, 7, 16, 17])
def test_no_code_beyond_the_bins_is_counted_on_either_side(library, bins):
    every = torch.arange(256, dtype=torch.uint8).repeat(2, 3)
    y = random_codes(3, every.shape[1], bins=bins)

    assert_cross_is_right(every, y, bins, (0, 1), library)
    assert_cross_is_right(y, every, bins, (0, 1), library)
    found = cpu_histogram.joint_histogram(every, y[:2], bins=bins, library=library)
    assert torch.equal(found, reference.joint_histogram(every, y[:2], bins=bins))


def test_dense_rows_are_read_where_they_are_and_others_by_value(library):
    wide = random_codes(6, 400, bins=16)
    tall = random_codes(300, 6, bins=16, seed=1).T
    for x, y in ((wide[::2, 50:350], tall[1::2]), (wide[:1, :300].expand(3, 300), tall[:3])):
        found = cpu_histogram.joint_histogram(x, y, bins=16, library=library)
        assert torch.equal(found, reference.joint_histogram(x, y, bins=16))
        assert_cross_is_right(x, y, 16, (0, 5), library)


def test_results_do_not_depend_on_the_number_of_threads(library):
    values = torch.randn(90, 5000, generator=torch.Generator().manual_seed(0))

    def results() -> list[Tensor]:
        x = cpu_histogram.equal_mass_codes(values, bins=16, library=library)
        edges = values[:, :9].sort(dim=1).values
        return [
            x,
            cpu_histogram.edge_codes(values, edges, library=library),
            cpu_histogram.joint_histogram(x, x.flip(0), bins=16, library=library),
            cpu_histogram.matched_information(x, x.flip(0), bins=16, library=library),
            cpu_histogram.cross_histogram(x, x[:3], bins=16, library=library),
            cpu_histogram.cross_information(x, x[:20], bins=16, library=library),
        ]

    one = results()
    torch.set_num_threads(3)
    try:
        three = results()
    finally:
        torch.set_num_threads(1)

    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_every_value_is_written(library, poisoned_memory):
    x = random_codes(70, 100, bins=16)

    assert_cross_is_right(x, x[:3], 16, (0,), library)
    assert_cross_is_right(x[:, :0], x[:3, :0], 16, (0,), library)
    counts = cpu_histogram.joint_histogram(x, x, bins=16, num_groups=2, library=library)
    assert torch.equal(counts, reference.joint_histogram(x, x, bins=16, num_groups=2))


FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
values_with_ties = st.lists(
    st.sampled_from([*EXTREMES, math.nan]) | st.floats(-4, 4, width=16), min_size=1, max_size=80
)


@given(values_with_ties, st.sampled_from(BINS), st.sampled_from(FLOATS))
def test_equal_mass_codes_equal_the_oracle(library, values, bins, dtype):
    finite = [0.5 if math.isnan(value) else value for value in values]
    rows = torch.tensor([values, finite, finite[::-1]]).to(dtype)

    found = cpu_histogram.equal_mass_codes(rows, bins=bins, library=library)

    assert torch.equal(found, reference.equal_mass_codes(rows, bins=bins))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bins", [2, 16, 256])
def test_equal_mass_codes_of_any_distribution_equal_the_oracle(library, bins, dtype):
    z = torch.randn(2, 5003, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = torch.cat(
        [
            z,
            z.relu(),
            z / z.flip(1),  # heavy tails
            z.mul(30).exp(),  # all magnitudes
            z.round(),
            z.sign(),
            1 + 1e-6 * z,  # neighbors differ in the last bits
            z.sort(dim=1).values,
            torch.where(z > 2, 1e30 * z, 1e-30 * z),
            (torch.arange(5003) % 2049 * 2.0**-149)[None],  # all bit patterns of a range
        ]
    ).to(dtype)

    found = cpu_histogram.equal_mass_codes(rows, bins=bins, library=library)

    assert torch.equal(found, reference.equal_mass_codes(rows, bins=bins))


@given(values_with_ties, st.lists(st.sampled_from(EXTREMES), min_size=3), st.sampled_from(FLOATS))
def test_edge_codes_equal_the_oracle(library, values, edges, dtype):
    rows = torch.tensor([values, values[::-1]]).to(dtype)
    ascending = torch.tensor([sorted(edges), [float(n) for n in range(len(edges))]]).to(dtype)

    found = cpu_histogram.edge_codes(rows, ascending, library=library)

    assert torch.equal(found, reference.edge_codes(rows, ascending))


def test_edge_codes_of_many_bins_equal_the_oracle(library):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 1003, generator=generator)
    for bins in (2, 16, 17, 64, 255):
        edges = torch.randn(5, bins + 1, generator=generator).sort(dim=1).values
        values[:, : bins + 1] = edges

        found = cpu_histogram.edge_codes(values, edges, library=library)

        assert torch.equal(found, reference.edge_codes(values, edges))


MEMORY = """
import ctypes, sys
import torch
from mimic_fast.kernels import cpu_histogram, reference

def extra(function, *codes, **settings):
    '''Bytes in memory at the peak of a call beyond those before it.'''
    ctypes.CDLL(None).malloc_trim(0)  # what is free is given back and must be asked for again
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is from now on
    before = held("VmRSS")
    result = function(*codes, bins=16, **settings)
    return held("VmHWM") - before

def held(name):
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(name))
    return 1024 * int(line.split()[1])

torch.set_num_threads(1)
library = {"library": ctypes.CDLL(sys.argv[1])}
for rows, partners, images in ((256, 64, 2048), (300, 70, 20_000), (3, 2, 300_000)):
    x, y = (torch.randint(16, (n, images), dtype=torch.uint8) for n in (rows, partners))
    code_bytes = (rows + partners) * images
    print(code_bytes, rows * partners, extra(cpu_histogram.cross_information, x, y, **library))
    print(2 * x.numel(), rows, extra(cpu_histogram.matched_information, x, x, **library))
    print(2 * x.numel(), rows, extra(reference.matched_information, x, x))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs Linux with glibc")
def test_information_needs_a_tenth_of_the_codes_at_most(library: ctypes.CDLL):
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, library._name], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [[int(number) for number in line.split()] for line in done.stdout.splitlines()]
    within = [extra <= 0.1 * code_bytes + 8 * pairs + 2**20 for code_bytes, pairs, extra in lines]

    # the oracle, which holds indices, shows that the measurement sees what is held
    assert within == [True, True, False] * 3, lines
