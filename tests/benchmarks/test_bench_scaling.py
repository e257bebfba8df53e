"""The scaling benchmark runs as a script; its model against arithmetic done by hand."""

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.e2e_setup import ENCODERS
from benchmarks.scaling_model import (
    Network,
    Ring,
    Work,
    all_reduce,
    contrast_seconds,
    ddp_buckets,
    ddp_exposed,
    fitted_ring,
    fsdp2_seconds,
    lap,
    ring_of,
)
from benchmarks.scaling_projection import NETWORKS, Model, step_seconds
from benchmarks.scaling_rows import bootstrap_median
from mimic_fast.planning.fake import meta_encoder

ROOT = Path(__file__).parents[2]
# lap(size) is size / 2 on two ranks
PLAIN = Ring(ranks=2, latency=0.0, rate=1.0)
ARMS = {"synchronized BatchNorm", "local BatchNorm"}

sizes = st.lists(st.floats(1e3, 1e9), min_size=1, max_size=20)
rings = st.builds(
    Ring, ranks=st.integers(2, 512), latency=st.floats(1e-6, 1e-2), rate=st.floats(1e8, 1e12)
)


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_scaling.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_two_processes_leave_efficiencies_with_intervals_and_a_checked_model(tmp_path):
    out = tmp_path / "rows.csv"

    done = bench("--quick", "--pairs", "3", "--out", str(out))

    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = rows_of(out)
    assert {row["device"].partition(", ")[2].split()[0] for row in rows} == {"2"}
    medians = {
        (row["mode"], row["impl"], row["metric"]): float(row["p50"])
        for row in rows
        if row["op"] == "weak scaling, median"
    }
    for arm in ARMS:
        for impl in ("against gradients not synchronized", "against one process alone"):
            low, middle, high = (
                medians[arm, impl, f"wall_efficiency{which}"]
                for which in (", 95 % from", "", ", 95 % to")
            )
            assert 0 < low <= middle <= high
            assert medians[arm, impl, "pairs"] == 3
    predicted = [row for row in rows if row["op"] == "step, predicted"]
    assert {row["mode"] for row in predicted} == ARMS
    assert {row["impl"] for row in predicted} == {"overlap with backward", "no overlap"}
    # What DistributedDataParallel did is what the projection takes it to do.
    buckets = ddp_buckets(list(meta_encoder(ENCODERS["small"]).parameters()))
    found = {row["metric"]: float(row["p50"]) for row in predicted}
    assert found["buckets"] == len(buckets)
    assert found["gradients"] == pytest.approx(sum(buckets) / 1e6, rel=1e-4)
    (alpha,) = [float(row["p50"]) for row in rows if row["metric"] == "alpha"]
    assert alpha >= 0


def test_projection_says_what_it_assumes_and_that_nothing_was_measured(tmp_path):
    out = tmp_path / "rows.csv"

    done = bench("project", "--images", "32", "--out", str(out))

    assert done.returncode == 0, done.stderr
    rows = rows_of(out)
    assert {row["device"] for row in rows} == {"projected for H100 GPUs, never measured"}
    inputs = {(row["impl"], row["metric"]): row["p50"] for row in rows if row["op"] == "input"}
    # timm's 85,798,656 weights without a classifier; projection head 768 to 768 to 128
    numbers = 85_798_656 + 768 * 769 + 128 * 769
    assert float(inputs["vit_base_patch16_224", "weights"]) == pytest.approx(
        4e-6 * numbers, rel=1e-5
    )
    for network in NETWORKS:
        assert float(inputs[network.name, "alpha in a node"]) == 3.4
    shares = {
        (row["impl"], row["mode"]): float(row["p50"])
        for row in rows
        if row["metric"] == "efficiency"
    }
    assert len(shares) == 2 * 2 * 2 * 4
    assert all(0 < share < 1 for share in shares.values())
    for model in ("vit_base_patch16_224", "vit_large_patch16_224"):
        for engine in ("ddp", "fsdp2"):
            for network in NETWORKS:
                line = [
                    shares[f"{model}, {engine}", f"{network.name}, {ranks} ranks"]
                    for ranks in (8, 16, 32, 64)
                ]
                assert line == sorted(line, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--quick",), "--quick is for trying it out: give --out"),
        (("--pairs", "1"), "--pairs must be at least 2, got 1"),
        (("fsdp",), "invalid choice: 'fsdp'"),
    ],
    ids=["quick into the committed rows", "one pair", "no such mode"],
)
def test_wrong_arguments_end_with_one_line_and_exit_2(arguments, message):
    done = bench(*arguments)

    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]


def test_all_reduce_of_four_ranks_costs_six_sends_and_three_halves_of_its_bytes():
    network = Network(name="", node=8, near_alpha=1e-3, near_beta=1e9, far_alpha=1.0, far_beta=1.0)

    seconds = all_reduce(ring_of(network, 4), 8e6)

    assert seconds == pytest.approx(6 * 1e-3 + 1.5 * 8e6 / 1e9)


@pytest.mark.parametrize(
    ("ranks", "near", "far", "rate"),
    [(8, 7, 0, 400.0), (16, 14, 1, 30.0), (64, 56, 7, 30.0)],
)
def test_ring_leaves_every_node_once(ranks, near, far, rate):
    network = Network(
        name="", node=8, near_alpha=1.0, near_beta=400.0, far_alpha=100.0, far_beta=30.0
    )

    ring = ring_of(network, ranks)

    assert ring == Ring(ranks=ranks, latency=near + 100.0 * far, rate=rate)


@pytest.mark.parametrize(
    ("size", "backward", "exposed"),
    [
        (2.0, 10.0, 2.0),  # sent at 5 and 10, 2 s each
        (6.0, 10.0, 7.0),  # the second waits for the first: 5 to 11, 11 to 17
        (6.0, 0.0, 12.0),  # nothing to hide behind
    ],
    ids=["hidden but for the last", "wire too slow", "no overlap"],
)
def test_buckets_wait_for_their_gradients_and_for_the_wire(size, backward, exposed):
    assert ddp_exposed([size, size], backward, PLAIN) == pytest.approx(exposed)


def test_cut_weights_are_gathered_a_block_ahead_and_scattered_a_block_behind():
    work = Work(before=100.0, forward=4.0, backward=8.0)

    seconds = fsdp2_seconds([2.0, 2.0], 2.0, work, PLAIN)

    # Laps of 1 s. Forward: rest and first block until 2, blocks until 4 and 6. Backward: last block
    # gathered until 7, blocks until 11 and 15; the first one's gradients until 16, the rest's 17.
    assert seconds == pytest.approx(17.0)


def test_step_on_64_ranks_adds_what_is_exposed_to_its_work():
    work = Work(before=1.0, forward=2.0, backward=3.0)
    model = Model(
        name="", work=work, images=4, width=8, buckets=(3.2e9, 3.2e8), blocks=(1.0,), rest=0.0
    )
    ring = ring_of(NETWORKS[0], 64)

    seconds = step_seconds(model, "ddp", ring)

    latency = 56 * 3.4e-6 + 7 * 14e-6
    last = 2 * (latency + 63 / 64 * 3.2e8 / 320e9)
    contrast = 3 * (latency + 63 / 64 * (64 * 2 * 4 * 8 * 4) / 320e9)
    assert seconds == pytest.approx(6.0 + last + contrast + 2 * latency, rel=1e-12)


@given(sizes=sizes, backward=st.floats(0, 1), ring=rings)
def test_exposed_is_the_last_bucket_at_least_and_all_of_them_at_most(sizes, backward, ring):
    exposed = ddp_exposed(sizes, backward, ring)

    costs = [all_reduce(ring, size) for size in sizes]
    assert costs[-1] - 1e-9 <= exposed <= sum(costs) + 1e-9


@given(sizes=sizes, rest=st.floats(0, 1e9), ring=rings, seconds=st.floats(1e-3, 10))
def test_cut_weights_cost_no_less_than_the_work_and_no_more_than_all_laps(
    sizes, rest, ring, seconds
):
    work = Work(before=0.0, forward=seconds, backward=2 * seconds)

    found = fsdp2_seconds(sizes, rest, work, ring)

    laps = 3 * sum(lap(ring, size) for size in sizes) + 2 * lap(ring, rest)
    assert work.total - 1e-9 <= found <= work.total + laps + 1e-6


@given(ring=rings)
def test_fit_finds_the_ring_that_made_the_times(ring):
    tried = [2.0**power for power in range(12, 27, 2)]

    found = fitted_ring(tried, [all_reduce(ring, size) for size in tried], ring.ranks)

    for size in tried:
        assert all_reduce(found, size) == pytest.approx(all_reduce(ring, size), rel=1e-6)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [((2.0, 1.0), Ring(ranks=2, latency=0.6, rate=math.inf)), ((1.0, 9.0), None)],
    ids=["large ones faster", "worse than proportional"],
)
def test_fit_has_no_negative_costs(seconds, expected):
    found = fitted_ring([1.0, 4.0], seconds, 2)

    assert found.latency >= 0
    assert found.rate > 0
    if expected is not None:
        assert found.latency == pytest.approx(expected.latency)
        assert found.rate == expected.rate


def test_projections_go_around_three_times():
    assert contrast_seconds(10, 4, PLAIN) == pytest.approx(3 * (2 * 2 * 10 * 4 * 4) / 2)


def test_interval_of_equal_values_is_that_value():
    assert bootstrap_median([0.97] * 5) == (0.97, 0.97)


def test_interval_of_the_median_is_that_of_the_order_statistics():
    # Binomial(100, 1/2) lies within 40 to 60 with 95 % and some.
    low, high = bootstrap_median(np.random.default_rng(0).permutation(101).tolist())

    assert low == pytest.approx(40, abs=2)
    assert high == pytest.approx(60, abs=2)


def test_interval_holds_the_median_in_19_of_20_experiments():
    generator = np.random.default_rng(3)
    runs = 300

    held = 0
    for _ in range(runs):
        low, high = bootstrap_median(generator.exponential(size=36).tolist(), resamples=2000)
        held += low <= math.log(2) <= high

    assert 0.91 < held / runs < 0.99
