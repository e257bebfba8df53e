"""What bench_traffic.py counts on one shape: bytes moved, launches, memory held."""

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from loss_peers import ATTENTION, at_loss, at_map, check, later, nad_loss, nad_map, ours
from loss_peers import LossAndGradient, Problem, gradient_of, plain, problem
from measure import Case, Machine, Row, single_row
from torch import Tensor

from mimic_fast import ops
from mimic_fast.kernels import reference
from mimic_fast.kernels.traffic import AtenTraffic, LiveMemory, kernel_traffic

OURS = "mimic_fast triton"
# What must be moved at least, in units of e: S and T read in the forward pass; S, T and the trunk's
# gradient read and the sum written in the backward pass. Attention alone needs no T.
IDEAL = {
    "mid layer, mse": 6,
    "mid layer, cosine": 6,
    "mid layer, attention only": 4,
    "last layer, mse": 5,
    "map of the teacher": 1,
}
LAYERS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Counted:
    """What one call moved and held.

    Args:
        moved: Bytes read and written, by kernels and operators.
        launches: Of our kernels.
        operators: Of PyTorch that move something.
        peak: Bytes that were live at once and had not been before.
    """

    moved: int
    launches: int
    operators: int
    peak: int


def traffic_rows(shape: str, *, machine: Machine, compile: bool) -> list[Row]:
    """All rows of one shape, bfloat16.

    Raises:
        AssertionError: If a candidate does not compute what all are to compute.
    """
    sizes = [int(size) for size in shape.split("x")]
    rows: list[Row] = []
    for mode, candidates in candidates_of(sizes).items():
        without = count(candidates.pop("without losses"))
        for impl, candidate in candidates.items():
            found = count(candidate)
            rows += _rows(Case(op="traffic", impl=impl, mode=mode, shape=shape), found, without)
    ...
