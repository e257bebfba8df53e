import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from mimic_fast.batchnorm import SyncBatchNorm, synchronize_batchnorm
from mimic_fast.distributed import SINGLE, Processes
from mimic_fast.errors import UsageError

CPU = torch.device("cpu")
TWO = Processes(rank=0, world=2, device=CPU)  # no collective is called where nothing is in training
ROWS = (5, 3)  # images of each process: unequal shares must count by their size
STEPS = 3

LAYERS = {
    "plain": lambda: nn.BatchNorm2d(4),
    "cumulative": lambda: nn.BatchNorm2d(4, momentum=None),
    "slow-eps": lambda: nn.BatchNorm2d(4, momentum=0.03, eps=0.1),
    "no-affine": lambda: nn.BatchNorm2d(4, affine=False),
    "no-statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "timm": lambda: BatchNormAct2d(4),
    "rows": lambda: nn.BatchNorm1d(4),
    "sequences": lambda: nn.BatchNorm1d(4),
}
SHAPES = {"rows": (4,), "sequences": (4, 3)}  # of an input without its batch; else maps
INPUTS = {
    "f64": (torch.float64, 0.0),
    "f32-far": (torch.float32, 1000.0),  # a mean of 1000 deviations, where sums of squares cancel
    "bf16": (torch.bfloat16, 3.0),
}


def layer(kind: str, dtype: torch.dtype) -> nn.Module:
    """The layer with weights, biases and statistics other than at the start."""
    made = LAYERS[kind]()
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        nn.init.normal_(parameter, 0.5, 0.3, generator=generator)
    for name, buffer in made.named_buffers():
        if name != "num_batches_tracked":
            nn.init.uniform_(buffer, 0.5, 2.0, generator=generator)
    return made.double() if dtype == torch.float64 else made


def data(kind: str, name: str, step: int) -> tuple[Tensor, Tensor]:
    """The joined batch of a step, and the gradient that comes back to it."""
    dtype, mean = INPUTS[name]
    generator = torch.Generator().manual_seed(step)
    shape = (2, sum(ROWS), *SHAPES.get(kind, (4, 3, 5)))
    images, grads = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (images + mean).to(dtype), grads.to(dtype)


def run_layer(module: nn.Module, kind: str, name: str, rows: slice) -> dict[str, Any]:
    """What a process computes of its rows: outputs, gradients and the state it ends with."""
    outputs, input_grads = [], []
    for step in range(STEPS):
        images, grads = (t[rows] for t in data(kind, name, step))
        images = images.clone().requires_grad_()
        output = module(images)
        output.backward(grads)
        outputs.append(output.detach())
        input_grads.append(images.grad)
    parameters = {key: value.grad for key, value in module.named_parameters()}
    state = {key: value.detach() for key, value in module.state_dict().items()}
    return {"outputs": outputs, "inputs": input_grads, "parameters": parameters, "state": state}


def worker() -> dict[str, Any]:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    processes = Processes(rank=rank, world=2, device=CPU)
    rows = slice(0, ROWS[0]) if rank == 0 else slice(ROWS[0], None)
    results = {}
    for kind in LAYERS:
        for name, (dtype, _) in INPUTS.items():
            model = nn.Sequential(layer(kind, dtype))
            synchronize_batchnorm(model, processes)
            results[f"{kind} {name}"] = run_layer(model[0], kind, name, rows)
    return results


@pytest.fixture(scope="module")
def two_processes(run_processes) -> list[dict[str, Any]]:
    return run_processes(worker)


def tolerance(name: str) -> dict[str, Any]:
    # float64: 1e-9 is the project's bar. float32: inputs near 1000 are rounded by 6e-5 of a
    # deviation and weight gradients are sums of 360 terms (measured: 1.2e-3). bfloat16: three
    # digits.
    return {
        "f64": {"rtol": 1e-9, "atol": 1e-9},
        "f32-far": {"rtol": 1e-4, "atol": 2e-3},
        "bf16": {"rtol": 2e-2, "atol": 2e-2},
    }[name]


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("kind", LAYERS)
def test_two_processes_equal_batchnorm_on_the_joined_batch(kind, name, two_processes):
    expected = run_layer(layer(kind, INPUTS[name][0]), kind, name, slice(None))
    first, second = (result[f"{kind} {name}"] for result in two_processes)

    for key in ("outputs", "inputs"):
        for step in range(STEPS):
            found = torch.cat([first[key][step], second[key][step]])
            torch.testing.assert_close(found, expected[key][step], **tolerance(name))
    for key, value in expected["parameters"].items():
        found = first["parameters"][key] + second["parameters"][key]
        torch.testing.assert_close(found, value, **tolerance(name), check_dtype=False)
    assert list(first["state"]) == list(expected["state"])
    for key, value in expected["state"].items():
        assert torch.equal(first["state"][key], second["state"][key])
        torch.testing.assert_close(first["state"][key], value, **tolerance(name))


@pytest.mark.parametrize("kind", ["plain", "timm"])
def test_running_statistics_of_half_precision_inputs_are_float32(kind, two_processes):
    exact = layer(kind, torch.float64)
    for step in range(STEPS):
        exact(data(kind, "bf16", step)[0].double())

    state = two_processes[0][f"{kind} bf16"]["state"]

    for key, value in exact.state_dict().items():
        if "running" in key:
            torch.testing.assert_close(state[key].double(), value, rtol=1e-5, atol=1e-5)


def network(act: bool) -> nn.Sequential:
    torch.manual_seed(0)
    norm: nn.Module = BatchNormAct2d(6) if act else nn.BatchNorm2d(6)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.Sequential(norm), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("act", [False, True], ids=["torch", "timm"])
def test_synchronized_network_keeps_state_keys_and_evaluates_alike(act, device):
    # On a GPU the library's own layers stand in; in eval mode they run here as well.
    model = network(act).eval()
    plain = copy.deepcopy(model)
    images = torch.randn(2, 3, 8, 8)

    found = synchronize_batchnorm(model, Processes(rank=0, world=2, device=torch.device(device)))

    assert found is model
    assert [type(m) for m in model.modules()] != [type(m) for m in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert torch.equal(model(images), plain(images))
    assert (model[1](-images.new_ones(1, 6, 2, 2)).min() >= 0) == act  # activated


def test_parameters_stay_the_ones_an_optimizer_holds():
    model = network(act=True)
    before = {key: id(value) for key, value in model.named_parameters()}
    buffers = {key: id(value) for key, value in model.named_buffers()}

    synchronize_batchnorm(model, TWO)

    assert {key: id(value) for key, value in model.named_parameters()} == before
    assert {key: id(value) for key, value in model.named_buffers()} == buffers


def test_hooks_and_copies_survive():
    model = network(act=False)
    seen: list[Tensor] = []
    model[3].register_forward_hook(lambda *arguments: seen.append(arguments[2]))
    synchronize_batchnorm(model, TWO)

    copied = copy.deepcopy(model).eval()
    output = copied(torch.zeros(1, 3, 8, 8))

    assert isinstance(copied[3], SyncBatchNorm)
    assert seen[0] is output


def test_one_process_keeps_its_layers():
    model = network(act=True)
    before = [type(module) for module in model.modules()]

    assert synchronize_batchnorm(model, SINGLE) is model
    assert [type(module) for module in model.modules()] == before


def test_synchronizing_twice_is_synchronizing_once():
    model = network(act=True)
    once = [type(m) for m in synchronize_batchnorm(model, TWO).modules()]

    assert [type(m) for m in synchronize_batchnorm(model, TWO).modules()] == once


class Renormalized(nn.BatchNorm2d):
    """A layer we know nothing about."""


@pytest.mark.parametrize("strange", [Renormalized(4), nn.BatchNorm3d(4)])
def test_layers_that_cannot_be_synchronized_are_refused_by_name(strange):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), strange)

    with pytest.raises(UsageError, match=f"cannot synchronize a {type(strange).__name__} on CPU"):
        synchronize_batchnorm(model, TWO)


@pytest.mark.parametrize("name", ["weight", "bias", "input"])
def test_gradients_pass_gradcheck(name):
    model = layer("plain", torch.float64)
    wrapper = nn.Sequential(model)
    synchronize_batchnorm(wrapper, TWO)
    assert isinstance(model, SyncBatchNorm)
    model.processes = SINGLE  # the formulas alone, without the collectives
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 4, 2, 2, generator=generator, dtype=torch.float64)

    if name == "input":
        assert torch.autograd.gradcheck(wrapper, images.requires_grad_())
    else:
        assert torch.autograd.gradcheck(
            lambda _: wrapper(images), getattr(model, name).requires_grad_()
        )
