"""Alpha-beta model of a training step on many processes: work, and communication it cannot hide.

Every collective goes around a ring (Thakur, Rabenseifner and Gropp 2005): a lap of n - 1 sends
gathers or scatters a buffer, two laps reduce it everywhere. A send costs alpha, and its bytes over
beta: ``T = 2 (n - 1) alpha + 2 (n - 1) / n bytes / beta`` for an all-reduce. Collectives share one
wire, one after another. Processes are equally fast here; in a cluster the slowest one counts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch._C._distributed_c10d import _compute_bucket_assignment_by_size

# Bytes; what DistributedDataParallel takes where nobody chooses (bucket_cap_mb).
_FIRST_BUCKET_CAP, _BUCKET_CAP = 1 << 20, 25 << 20
_FLOAT = 4  # bytes of a projection in the contrastive loss


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """What connects the processes.

    Args:
        name: As rows have it.
        node: Processes that share fast links.
        near_alpha: Seconds of a send inside a node.
        near_beta: Bytes a second of a ring inside a node.
        far_alpha: Seconds of a send between nodes.
        far_beta: Bytes a second of a ring over several nodes, over all adapters of a node.
    """

    name: str
    node: int
    near_alpha: float
    near_beta: float
    far_alpha: float
    far_beta: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Ring:
    """A ring over all processes.

    Args:
        ranks: Processes.
        latency: Seconds of a lap of empty buffers.
        rate: Bytes a second.
    """

    ranks: int
    latency: float
    rate: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What one process computes in a step, alone, seconds.

    Args:
        before: Before the student's forward pass: the teacher.
        forward: The student's forward pass, all views.
        backward: Its backward pass: what gradients can be sent beside.
    """

    before: float
    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Of a step."""
        return self.before + self.forward + self.backward


def ring_of(network: Network, ranks: int) -> Ring:
    """A ring that enters every node once; of n - 1 sends all but (nodes - 1) stay in a node.

    As NCCL's own estimate counts them (ncclTopoTuneModel in src/graph/tuning.cc).
    """
    nodes = -(-ranks // network.node)
    far = nodes - 1
    latency = (ranks - 1 - far) * network.near_alpha + far * network.far_alpha
    slower = min(network.near_beta, network.far_beta)
    return Ring(ranks=ranks, latency=latency, rate=network.near_beta if nodes == 1 else slower)


def lap(ring: Ring, size: float) -> float:
    """Seconds to gather a buffer of ``size`` bytes in all, or to reduce and scatter it."""
    return ring.latency + (ring.ranks - 1) / ring.ranks * size / ring.rate


def all_reduce(ring: Ring, size: float) -> float:
    """Seconds to reduce ``size`` bytes everywhere."""
    return 2 * lap(ring, size)


def ddp_exposed(buckets: Sequence[float], backward: float, ring: Ring) -> float:
    """Seconds that all-reduces of gradients last beyond the backward pass.

    A bucket is sent when its last gradient is there, after a share of the backward pass as large as
    its share of the bytes; the last one is there when all is computed, and nothing hides it. With
    ``backward`` 0 that holds for all of them.

    Args:
        buckets: Bytes, in the order in which they are sent.
        backward: Seconds.
        ring: Of all processes.
    """
    ready = done = 0.0
    for size in buckets:
        ready += backward * size / sum(buckets)
        done = max(done, ready) + all_reduce(ring, size)
    return done - backward


def fsdp2_seconds(blocks: Sequence[float], rest: float, work: Work, ring: Ring) -> float:
    """Seconds of forward and backward with weights cut block by block.

    A block's weights are gathered while the one before it computes, in forward and again in
    backward, where its gradients are scattered while the next one computes. What belongs to no
    block is gathered once. All blocks are taken to compute equally long. ZeRO 3 sends as many bytes
    in as many laps, ahead by numbers instead of blocks.

    Args:
        blocks: Bytes of each block, shallow to deep.
        rest: Bytes of what is in no block.
        work: Of one process.
        ring: Of all processes.
    """
    each = work.forward / len(blocks)
    wire = lap(ring, rest) + lap(ring, blocks[0])
    gathered, computed = wire, 0.0
    for following in (*blocks[1:], None):
        start = max(computed, gathered)
        if following is not None:
            wire = gathered = max(wire, start) + lap(ring, following)
        computed = start + each
    each = work.backward / len(blocks)
    wire = gathered = max(wire, computed) + lap(ring, blocks[-1])
    for size, following in zip(reversed(blocks), (*reversed(blocks[:-1]), None), strict=True):
        start = max(computed, gathered)
        if following is not None:
            wire = gathered = max(wire, start) + lap(ring, following)
        computed = start + each
        wire = max(wire, computed) + lap(ring, size)
    return max(computed, wire + lap(ring, rest))


def contrast_seconds(images: int, width: int, ring: Ring) -> float:
    """Projections of two views gathered from all processes, their gradients reduced everywhere."""
    size = float(ring.ranks * 2 * images * width * _FLOAT)
    return lap(ring, size) + all_reduce(ring, size)


def ddp_buckets(parameters: Sequence[torch.Tensor]) -> list[float]:
    """Bytes of DistributedDataParallel's buckets in the order in which they are sent.

    By its own function, on the parameters from the last to the first: nearly the order in which
    gradients come, in which it cuts them after the first step. Meta tensors will do.
    """
    trained = [p for p in reversed(parameters) if p.requires_grad]
    caps = [_FIRST_BUCKET_CAP, _BUCKET_CAP]
    indices, _ = _compute_bucket_assignment_by_size(trained, caps)
    return [float(sum(trained[i].nbytes for i in bucket)) for bucket in indices]


def fitted_ring(sizes: Sequence[float], seconds: Sequence[float], ranks: int) -> Ring:
    """The ring whose all-reduces come nearest to what was measured.

    Least squares of relative errors: a buffer of 64 MB would else outweigh all small ones, which
    alone tell alpha. Neither latency nor seconds a byte are below 0.
    """
    bytes_sent = 2 * (ranks - 1) / ranks * np.asarray(sizes, dtype=float)
    measured = np.asarray(seconds, dtype=float)
    columns = np.stack([np.full_like(bytes_sent, 2.0), bytes_sent], axis=1) / measured[:, None]
    latency, inverse = np.linalg.lstsq(columns, np.ones_like(measured), rcond=None)[0]
    if min(latency, inverse) < 0:  # the nearest of what can be: one of the two alone
        kept = int(latency < 0)
        best = columns[:, kept].sum() / (columns[:, kept] ** 2).sum()
        latency, inverse = (0.0, best) if kept else (best, 0.0)
    rate = float(1 / inverse) if inverse > 0 else math.inf
    return Ring(ranks=ranks, latency=float(latency), rate=rate)
