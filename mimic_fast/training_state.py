"""What a training process must remember besides weights: optimizer moments and random generators.

Both become flat tensors and JSON, the only two things that ``checkpoint.py`` writes, and come back
bit for bit.
"""

import math
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mimic_fast.distributed import Processes
from mimic_fast.errors import UnsafeInputError


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Splits an optimizer's state into tensors (``INDEX.NAME``) and JSON (the rest)."""
    saved = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, values in saved["state"].items():
        scalars[str(index)] = {}
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                scalars[str(index)][name] = value
    for group in saved["param_groups"]:
        for name, value in group.items():
            if isinstance(value, Tensor):
                raise ValueError(
                    f"optimizer option '{name}' is a tensor; run states need plain numbers"
                )
    return tensors, {"scalars": scalars, "groups": saved["param_groups"]}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]
) -> None:
    """Gives ``optimizer`` the state that :func:`optimizer_tensors` took, bit for bit.

    Not ``load_state_dict``, which casts moments to the parameter's type and drops the memory
    layout: beside channels_last parameters, contiguous moments take another code path and may
    round differently.

    Raises:
        UnsafeInputError: If the state belongs to another set of parameters.
    """
    if [len(group["params"]) for group in rest["groups"]] != [
        len(group["params"]) for group in optimizer.param_groups
    ]:
        raise UnsafeInputError("the optimizer state belongs to another model; start a new run")
    params: dict[int, tuple[Tensor, bool]] = {}
    for group, saved in zip(optimizer.param_groups, rest["groups"], strict=True):
        on_device = bool(saved.get("capturable") or saved.get("fused"))
        params |= {
            index: (param, on_device)
            for index, param in zip(saved["params"], group["params"], strict=True)
        }
        for name, value in saved.items():
            if name != "params":
                group[name] = tuple(value) if isinstance(group.get(name), tuple) else value
    optimizer.state.clear()
    for index, values in rest["scalars"].items():
        optimizer.state[params[int(index)][0]] = dict(values)
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        param, on_device = params[int(index)]
        optimizer.state[param][name] = _moment(tensor, param, name == "step" and not on_device)


def rng_tensors() -> dict[str, Tensor]:
    """The state of every random generator of this process: torch, CUDA, Python and NumPy."""
    _, words, gauss = random.getstate()
    generator = np.random.get_state(legacy=False)
    assert isinstance(generator, dict)
    inner = generator["state"]
    tensors = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor(math.nan if gauss is None else gauss, dtype=torch.float64),
        "numpy": torch.tensor([*inner["key"].tolist(), inner["pos"], generator["has_gauss"]]),
        "numpy_gauss": torch.tensor(generator["gauss"], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors


def rng_of_all(processes: Processes) -> dict[str, Tensor]:
    """The generators of every process, named ``RANK.GENERATOR``, on every process."""
    own = rng_tensors()
    if processes.world == 1:
        return {f"0.{name}": value for name, value in own.items()}
    found: list[dict[str, Tensor]] = [{} for _ in range(processes.world)]
    dist.all_gather_object(found, own)
    return {f"{r}.{name}": value for r, one in enumerate(found) for name, value in one.items()}


def restore_rng_of(tensors: Mapping[str, Tensor], processes: Processes) -> None:
    """This process's own generators; one that was not there when they were saved keeps its seed."""
    prefix = f"{processes.rank}."
    own = {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}
    if own:
        restore_rng(own)


def seed_process(seed: int, processes: Processes) -> None:
    """Seeds the generators that random layers draw from, differently in every process."""
    torch.manual_seed(seed * 65537 + processes.rank)


def restore_rng(tensors: Mapping[str, Tensor]) -> None:
    """Puts every random generator back to where :func:`rng_tensors` found it."""
    torch.set_rng_state(tensors["torch"])
    gauss = tensors["python_gauss"].item()
    random.setstate((3, tuple(tensors["python"].tolist()), None if math.isnan(gauss) else gauss))
    *key, position, has_gauss = tensors["numpy"].tolist()
    cached = tensors["numpy_gauss"].item()
    np.random.set_state(("MT19937", np.array(key, np.uint32), position, has_gauss, cached))
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def _moment(tensor: Tensor, param: Tensor, stays_on_cpu: bool) -> Tensor:
    if stays_on_cpu or tensor.shape != param.shape:
        return tensor.clone()
    return torch.empty_like(param, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
