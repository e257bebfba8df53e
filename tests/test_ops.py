"""Which path an op takes, what it refuses, and that every path gives the same numbers."""

import os
import subprocess
import sys

import jaxtyping
import pytest
import torch
from torch import Tensor

from mimic_fast import ops
from mimic_fast.kernels import reference

CPU = torch.device("cpu")


@pytest.fixture
def unchecked():
    """Switches the type checks of the test run off: a user has none of them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codes(*shape: int, bins: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(bins, shape, generator=generator).to(torch.uint8)


def test_cpu_tensors_take_the_cpp_path_and_say_why():
    for op in ops.OPS:
        choice = ops.choose(op, CPU, torch.float32)
        assert choice.path == "cpp"
        assert "cpu" in choice.reason


def test_a_dtype_that_the_kernels_do_not_take_runs_on_the_reference():
    choice = ops.choose("distill", CPU, torch.float16)

    assert choice.path == "reference"
    assert "float16" in choice.reason


@pytest.mark.parametrize("path", ["reference", "triton", "cpp"])
def test_every_path_gives_the_same_attention_and_clone_loss(path):
    student, teacher = randn(3, 8, 4, 4).requires_grad_(), randn(3, 8, 4, 4, seed=1)

    def losses() -> Tensor:
        return ops.attention_loss(student, teacher) + ops.clone_loss(student, teacher, kind="mse")

    with ops.force(path, op="distill"):
        before = ops.calls()
        found = losses()
        ran = ops.calls() - before
    (gradient,) = torch.autograd.grad(found, student)

    expected = reference.attention_loss(student.double(), teacher.double())
    expected = expected + reference.clone_loss(student.double(), teacher.double(), kind="mse")
    (wanted,) = torch.autograd.grad(expected, student)
    assert set(ran) == {f"distill/{path}"}
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_the_compiled_path_gives_the_same_losses():
    code = (
        "import torch; from mimic_fast import ops\n"
        "s, t = torch.randn(3, 8, 4, 4, requires_grad=True), torch.randn(3, 8, 4, 4)\n"
        "with ops.force('reference', op='distill'): plain = ops.attention_loss(s, t)\n"
        "with ops.force('compiled', op='distill'): compiled = ops.attention_loss(s, t)\n"
        "wanted, found = (torch.autograd.grad(x, s)[0] for x in (plain, compiled))\n"
        "torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=0)\n"
        "torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)\n"
        "print(ops.calls()['distill/compiled'])"
    )  # in a process of its own: the type checks of the test run cannot be compiled

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "2"


@pytest.mark.parametrize("path", ["reference", "triton", "cpp"])
def test_every_path_counts_the_same(path):
    x, y = codes(3, 40), codes(3, 40, seed=1)
    groups = torch.arange(40) % 3
    settings = {"bins": 5, "num_groups": 3, "rolls": (0, 7), "images": (2, 37)}

    with ops.force(path):
        counts = ops.joint_histogram(x, y, groups, **settings)
        information = ops.matched_information(x, y, bins=5)
        cross = ops.cross_information(x, y, bins=5)

    assert torch.equal(counts, reference.joint_histogram(x, y, groups, **settings))
    expected = reference.matched_information(x, y, bins=5)
    torch.testing.assert_close(information.double(), expected, rtol=0, atol=1e-5)
    expected = reference.cross_information(x, y, bins=5)
    torch.testing.assert_close(cross.double(), expected, rtol=0, atol=1e-5)


def test_force_is_undone_and_takes_the_place_of_an_outer_one():
    with ops.force("reference"):
        with ops.force("cpp", op="distill"):
            assert ops.choose("distill", CPU, torch.float32).path == "cpp"
            assert ops.choose("histogram", CPU).path == "reference"
        assert ops.choose("distill", CPU, torch.float32).path == "reference"
    assert ops.choose("distill", CPU, torch.float32).path == "cpp"


@pytest.mark.usefixtures("unchecked")
def test_a_path_that_does_not_exist_is_refused():
    with (
        pytest.raises(ValueError, match="expected one of reference, compiled, triton, cpp"),
        ops.force("cuda"),  # pyright: ignore[reportArgumentType]
    ):
        pass


def test_compiled_counting_is_refused_by_name():
    with ops.force("compiled"), pytest.raises(RuntimeError, match="no compiled form"):
        ops.matched_information(codes(2, 9), codes(2, 9), bins=5)


def test_triton_without_a_gpu_is_refused_with_the_alternative():
    code = (
        "import torch; from mimic_fast import ops\n"
        "try:\n"
        "    with ops.force('triton'): ops.clone_loss(torch.ones(2, 3), torch.ones(2, 3))\n"
        "except RuntimeError as error: print(error)"
    )
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    said = subprocess.run(
        [sys.executable, "-c", code], env=plain, capture_output=True, text=True, check=True
    ).stdout

    assert said.strip() == (
        "triton was asked for, but Triton needs a GPU and the tensors are on cpu; "
        "use cpp or reference"
    )


def test_without_a_compiler_the_reference_runs_and_it_is_said_once(tmp_path):
    code = (
        "import torch; from mimic_fast import ops\n"
        "for _ in range(3):\n"
        "    loss = ops.clone_loss(torch.ones(2, 3), torch.ones(2, 3))\n"
        "print(round(float(loss), 6), dict(ops.calls()))"
    )
    bare = {**os.environ, "PATH": str(tmp_path), "HOME": str(tmp_path)}

    done = subprocess.run(
        [sys.executable, "-c", code], env=bare, capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "-1.0 {'distill/reference': 3}"
    assert done.stderr.count("no C++ compiler") == 1
    assert "slower" in done.stderr


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3), r"floating-point.*int64"),
        (randn(2, 3), randn(2, 4), r"\[2, 3\].*got \[2, 4\]"),
        (randn(0, 3), randn(0, 3), r"at least one image, got \[0, 3\]"),
        (randn(2), randn(2), r"features \[B, D\].*got \[2\]"),
    ],
    ids=["dtype", "shapes", "empty", "dimensions"],
)
def test_losses_refuse_what_does_not_fit(student, teacher, message):
    weights = torch.ones(2, 1)

    with pytest.raises(ValueError, match=message):
        ops.layer_losses([student], [ops.Target(teacher=teacher)], weights, clone="mse")


@pytest.mark.usefixtures("unchecked")
def test_losses_refuse_settings_that_do_not_fit():
    tokens, weights = randn(2, 5, 3), torch.ones(2, 1)

    with pytest.raises(ValueError, match=r"power must be at least 1, got 0\.5"):
        ops.layer_losses([tokens], [ops.Target(teacher=tokens)], weights, power=0.5)
    with pytest.raises(ValueError, match=r"prefix must leave .* \[2, 5, 3\], got 5"):
        ops.layer_losses([tokens], [ops.Target(teacher=tokens)], weights, prefix=5)
    with pytest.raises(ValueError, match=r"attention map to be \[2, 5\].*got \[2, 4\]"):
        ops.layer_losses([tokens], [ops.Target(power=randn(2, 4))], weights)
    with pytest.raises(ValueError, match="needs the teacher's activation"):
        ops.layer_losses([tokens], [ops.Target(power=randn(2, 5))], weights, clone="mse")
    with pytest.raises(ValueError, match="2 activations, 1 targets and 1 weights"):
        ops.layer_losses([tokens] * 2, [ops.Target(teacher=tokens)], weights)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("bins", [1, 257])
def test_histograms_refuse_bins(bins):
    with pytest.raises(ValueError, match=f"bins must be 2 to 256, got {bins}"):
        ops.joint_histogram(codes(1, 4), codes(1, 4), bins=bins)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (codes(2, 9).int(), codes(2, 9), r"uint8 codes .* got torch.int32 \[2, 9\]"),
        (codes(2, 9), codes(3, 9), r"got \[2, 9\] and \[3, 9\]"),
        (codes(2, 9), codes(2, 8), r"got \[2, 9\] and \[2, 8\]"),
        (codes(2, 0), codes(2, 0), "at least one image, got none"),
    ],
    ids=["dtype", "pairs", "images", "empty"],
)
def test_histograms_refuse_codes_that_do_not_fit(x, y, message):
    with pytest.raises(ValueError, match=message):
        ops.matched_information(x, y, bins=4)


@pytest.mark.usefixtures("unchecked")
def test_edges_of_256_bins_are_refused():
    with pytest.raises(ValueError, match="256 bins leave no code for NaN"):
        ops.edge_codes(randn(1, 9), torch.linspace(0, 1, 257)[None])
    with pytest.raises(ValueError, match=r"images must be a range within 0\.\.9, got 3\.\.10"):
        ops.joint_histogram(codes(1, 9), codes(1, 9), bins=5, images=(3, 10))


def test_ranks_of_nan_are_refused():
    with pytest.raises(ValueError, match="got NaN"):
        ops.equal_mass_codes(torch.tensor([[1.0, float("nan"), 2.0]]), bins=2)
