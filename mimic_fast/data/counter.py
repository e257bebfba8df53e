"""Random numbers that are a pure function of a key: no state to save, no order to keep.

An image's augmentation depends on (seed, epoch, item id, stream) alone, so it is the same for any
world size, worker count, batch position or restart. The mixer is splitmix64's finalizer (Steele,
Lea and Flood, OOPSLA 2014, https://doi.org/10.1145/2660193.2660195) in wrapping int64 arithmetic.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def uniforms(
    ids: Int[Tensor, " item"],
    count: int,
    *,
    seed: int,
    epoch: int | Int[Tensor, " item"],
    stream: int,
) -> Float[Tensor, "item count"]:
    """Uniform numbers in [0, 1), float32 with 24 random bits.

    Args:
        ids: Item ids.
        count: Numbers per item.
        seed: Seed of the run.
        epoch: Pass over the data, of all items or of each.
        stream: Separates the uses within one epoch (first view, second view, hardening, ...).
    """
    key = torch.tensor(_GOLDEN, device=ids.device)
    for part in (seed, epoch, stream):
        key = _mixed(key + torch.as_tensor(part, device=ids.device).long() * _GOLDEN)
    items = _mixed(key + ids.long() * _GOLDEN)
    counters = torch.arange(1, count + 1, device=ids.device) * _GOLDEN
    bits = _mixed(items[:, None] + counters)
    return _shifted(bits, 40).float() * 2.0**-24


def _mixed(value: Tensor) -> Tensor:
    value = (value ^ _shifted(value, 30)) * _MIX_1
    value = (value ^ _shifted(value, 27)) * _MIX_2
    return value ^ _shifted(value, 31)


def _shifted(value: Tensor, bits: int) -> Tensor:
    # Logical shift: int64 >> keeps the sign, so the copies of the sign bit are masked away.
    return (value >> bits) & ((1 << (64 - bits)) - 1)
