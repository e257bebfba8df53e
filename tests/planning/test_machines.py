"""Sizes, GPUs and what the command line says of them."""

import pytest

from mimic_fast.errors import UsageError
from mimic_fast.planning.gpus import GPUS, find_gpu
from mimic_fast.planning.machines import machines_of
from mimic_fast.planning.sizes import parse_bytes, shown_bytes
from mimic_fast.recipe import load_settings


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80GB", 80 * 10**9),
        ("80 gb", 80 * 10**9),
        ("40GiB", 40 * 2**30),
        ("512MB", 512 * 10**6),
        ("0.5TB", 5 * 10**11),
    ],
)
def test_size_with_its_unit(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["80", "GB", "80 apples", "-80GB", "0GB", "8e1GB", "80GB/s", ""])
def test_size_that_is_none_is_refused(text):
    with pytest.raises(UsageError, match="with its unit"):
        parse_bytes(text)


def test_sizes_are_shown_with_their_unit():
    assert (shown_bytes(19.824e9), shown_bytes(3.2e6)) == ("19.82 GB", "3.2 MB")


def given(*overrides, **options):
    optim = load_settings(overrides=overrides).optim
    nothing = {"memory": None, "gpu": None, "peak_tflops": None, "bandwidth": None}
    return machines_of(optim, **{"gpus": 8, **nothing, **options})


def test_named_gpu_brings_memory_and_the_throughput_of_the_precision():
    half, single, tf32 = (
        given(*overrides, gpu="h100")
        for overrides in (["optim.precision=bf16"], [], ["optim.tf32=true"])
    )

    assert half.memory == 80 * 10**9
    assert [m.speed.tflops for m in (half, single, tf32) if m.speed] == [989, 67, 494]
    assert given("optim.precision=fp64", gpu="H100").speed is None


def test_more_gpus_than_a_node_has_go_over_the_network():
    within, between = (given(gpus=gpus, gpu="H100").speed for gpus in (8, 16))

    assert within is not None
    assert between is not None
    gpu = find_gpu("H100")
    assert (within.bandwidth, between.bandwidth) == (gpu.link, gpu.network)


def test_what_is_given_wins():
    machines = given(gpu="H100", memory="40GB", peak_tflops=100.0, bandwidth=3.0)

    assert machines.memory == 40 * 10**9
    assert machines.speed is not None
    assert (machines.speed.tflops, machines.speed.bandwidth) == (100, 3)


def test_memory_must_be_known_and_gpus_too():
    with pytest.raises(UsageError, match="--memory, as in 80GB"):
        given()
    with pytest.raises(UsageError, match="did you mean 'H100'"):
        given(gpu="H10")


def test_faster_types_are_faster_and_links_beat_networks():
    assert all(gpu.bf16 > gpu.tf32 > gpu.fp32 for gpu in GPUS)
    assert all(gpu.link > gpu.network for gpu in GPUS)
