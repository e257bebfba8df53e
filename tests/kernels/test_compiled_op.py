"""The losses as custom operators: under torch.compile the same numbers, in one graph."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from mimic_fast import ops

# In a process of its own: the type checks of the test run cannot be traced. aot_eager traces
# forward and backward as every backend does, and compiles nothing.
STEP = """
import sys
import torch
from torch import nn
from mimic_fast import ops
from mimic_fast.kernels import reference

def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

torch.manual_seed(0)
path, backend = sys.argv[1:]
layer = nn.Linear(6, 6)
tokens, teacher, weights = randn(2, 5, 6), randn(2, 5, 6, seed=1), torch.tensor([[0.5], [2.0]])
target = ops.Target(teacher=teacher)
for clone in ("none", "cosine", "mse"):
    def step():
        student = layer(tokens)
        (losses,) = ops.layer_losses([student], [target], weights, clone=clone, prefix=1)
        return losses.sum() + student.square().mean()

    torch._dynamo.reset()
    with ops.force(path, op="distill"):
        compiled = torch.compile(step, backend=backend, fullgraph=True)()
        found = torch.autograd.grad(compiled, list(layer.parameters()))
    student = layer(tokens)
    expected = reference.layer_losses(
        student, teacher, None, weights[:, 0], clone=clone, prefix=1
    ).sum() + student.square().mean()
    wanted = torch.autograd.grad(expected, list(layer.parameters()))
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=0)
    for own, value in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, value, rtol=1e-4, atol=1e-6)
print(dict(ops.calls()))
"""


@pytest.mark.parametrize(("path", "backend"), [("cpp", "aot_eager"), ("triton", "aot_eager")])
def test_a_compiled_step_has_one_graph_and_the_gradients_of_the_oracle(path, backend):
    done = subprocess.run(
        [sys.executable, "-c", STEP, path, backend], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr[-3000:]
    # a forward and a backward operator for each of the three losses
    assert done.stdout.strip() == f"{{'distill/{path}': 6}}"


@pytest.mark.slow
def test_a_step_compiled_by_inductor_has_the_gradients_of_the_oracle():
    test_a_compiled_step_has_one_graph_and_the_gradients_of_the_oracle("cpp", "inductor")


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # opcheck's own
@pytest.mark.parametrize("clone", ["none", "cosine", "mse"])
def test_operators_keep_the_rules_of_custom_operators(clone):
    def randn(*shape: int, seed: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    student, teacher = randn(2, 5, 6, seed=0).requires_grad_(), randn(2, 5, 6, seed=1)
    weights = torch.tensor([[0.5], [2.0]])
    assert ops.choose("distill", student.device, student.dtype).path == "cpp"

    torch.library.opcheck(
        torch.ops.mimic_fast.distill_forward.default,
        ([student], [teacher], [], weights, 2.0, clone, True, 1),
    )
