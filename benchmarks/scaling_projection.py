"""Weak scaling of ViT students on 8 to 64 GPUs, worked out: nothing here was ever measured.

Work and bytes are counted on the real student, teacher and losses (meta and fake tensors, no
weight is allocated); the machine is a set of assumptions, all of which go into the rows as inputs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from measure import Case, Machine, Row, single_row
from scaling_model import (
    Network,
    Ring,
    Work,
    all_reduce,
    contrast_seconds,
    ddp_buckets,
    ddp_exposed,
    fsdp2_seconds,
    ring_of,
)

from mimic_fast.config import Settings
from mimic_fast.encoders.blocks import blocks
from mimic_fast.encoders.recognise import recognise_spec
from mimic_fast.planning.counts import count
from mimic_fast.planning.fake_step import meta_networks
from mimic_fast.planning.flops import Work as ImageWork
from mimic_fast.planning.gpus import find_gpu
from mimic_fast.planning.timing import CONVOLUTION_SHARE, LINK_SHARE, NODE, PRODUCT_SHARE
from mimic_fast.recipe import load_settings

MODELS = ("vit_base_patch16_224", "vit_large_patch16_224")
RANKS = (8, 16, 32, 64)
IMAGES = 64  # of each process in a step
_GPU = find_gpu("H100")
_BITS = 8
# What a send costs: NCCL's own constants for rings with its Simple protocol (src/graph/tuning.cc,
# hwLat: NVLink 3.4 us, network 14 us). For TCP over Ethernet it has none: an assumption.
_NVLINK_ALPHA, _INFINIBAND_ALPHA, _ETHERNET_ALPHA = 3.4e-6, 14e-6, 50e-6
_NEAR = _GPU.link * 1e9 * LINK_SHARE
# Each of a node's adapters carries a ring of its own, as NCCL lays them.
NETWORKS = (
    Network(
        name="InfiniBand, 400 Gb/s a GPU",
        node=NODE,
        near_alpha=_NVLINK_ALPHA,
        near_beta=_NEAR,
        far_alpha=_INFINIBAND_ALPHA,
        far_beta=NODE * 400e9 / _BITS * LINK_SHARE,
    ),
    Network(
        name="Ethernet, 100 Gb/s a node",
        node=NODE,
        near_alpha=_NVLINK_ALPHA,
        near_beta=_NEAR,
        far_alpha=_ETHERNET_ALPHA,
        far_beta=100e9 / _BITS * LINK_SHARE,
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A student with its teacher and losses, as one process has them.

    Args:
        name: In timm.
        work: Of a step with so many images.
        images: Of a process in a step.
        width: Of a projection.
        buckets: Bytes of DistributedDataParallel's buckets as they are sent.
        blocks: Bytes of the student's blocks, shallow to deep.
        rest: Bytes of its weights in no block.
    """

    name: str
    work: Work
    images: int
    width: int
    buckets: tuple[float, ...]
    blocks: tuple[float, ...]
    rest: float


def projection_rows(images: int, *, machine: Machine) -> list[Row]:
    """Inputs first, then every model, network, engine and number of processes.

    Args:
        images: Of each process in a step.
        machine: Of the program that counts; its processor has no part in the figures.
    """
    machine = replace(machine, device=f"projected for {_GPU.name} GPUs, never measured")
    rows = _network_rows(machine)
    for name in MODELS:
        model = counted_model(name, images)
        rows += _model_rows(model, machine)
        for network in NETWORKS:
            rows += _scaling_rows(model, network, machine)
    return rows


def counted_model(name: str, images: int) -> Model:
    """Counts a model: default preset with the contrastive loss, whose projections are gathered."""
    settings = load_settings(
        values={
            "encoder": {"architecture": f"timm:{name}"},
            "loss": {"contrastive": 1.0},
            "optim": {"precision": "bf16"},
        }
    )
    spec = recognise_spec({}, settings.encoder, None).spec
    student, _ = meta_networks(spec, settings)
    sizes = [float(sum(p.nbytes for p in block.parameters())) for block in blocks(student.tapped)]
    parameters = list(student.parameters())
    flops = count(spec, settings, path="triton", on_gpu=True).flops
    forward = images * _seconds(flops.forward, settings)
    # Student and teacher are alike; the student sees two views, the teacher one.
    return Model(
        name=name,
        work=Work(
            before=forward / 3,
            forward=forward * 2 / 3,
            backward=images * _seconds(flops.backward, settings),
        ),
        images=images,
        width=settings.loss.projection,
        buckets=tuple(ddp_buckets(parameters)),
        blocks=tuple(sizes),
        rest=sum(p.nbytes for p in parameters) - sum(sizes),
    )


def step_seconds(model: Model, engine: str, ring: Ring) -> float:
    """A step of one of so many processes, with the small collectives of every step.

    These are the answer whether to stop and, where gradients are cut, their norm: latency alone.
    """
    work = model.work
    contrast = contrast_seconds(model.images, model.width, ring)
    if engine == "ddp":
        exposed = ddp_exposed(model.buckets, work.backward, ring)
        return work.total + exposed + contrast + all_reduce(ring, 0)
    passes = fsdp2_seconds(model.blocks, model.rest, work, ring)
    return work.before + passes + contrast + 2 * all_reduce(ring, 0)


def _seconds(flops: ImageWork, settings: Settings) -> float:
    tflops = _GPU.tflops(settings.optim.precision, tf32=settings.optim.tf32)
    assert tflops is not None
    return (flops.convolutions / CONVOLUTION_SHARE + flops.products / PRODUCT_SHARE) / tflops / 1e12


def _network_rows(machine: Machine) -> list[Row]:
    """Assumptions about the machine."""
    speed = Case(op="input", impl=_GPU.name, mode="assumed", shape="GPU", dtype="bfloat16")
    rows = [
        single_row(speed, "peak", "TFLOP/s", _GPU.bf16, machine=machine),
        single_row(speed, "of it, products", "share", PRODUCT_SHARE, machine=machine),
        single_row(speed, "of it, convolutions", "share", CONVOLUTION_SHARE, machine=machine),
    ]
    for network in NETWORKS:
        case = Case(op="input", impl=network.name, mode="assumed", shape="network")
        for metric, unit, value in (
            ("GPUs of a node", "", network.node),
            ("alpha in a node", "us", network.near_alpha * 1e6),
            ("beta in a node", "GB/s", network.near_beta / 1e9),
            ("alpha between nodes", "us", network.far_alpha * 1e6),
            ("beta between nodes", "GB/s", network.far_beta / 1e9),
        ):
            rows.append(single_row(case, metric, unit, value, machine=machine))
    return rows


def _model_rows(model: Model, machine: Machine) -> Iterator[Row]:
    """What was counted of a model, and what follows for one process."""
    shape = f"{model.images} images a process"
    case = Case(op="input", impl=model.name, mode="counted", shape=shape)
    weights = sum(model.blocks) + model.rest
    contrast = 2 * model.images * model.width * 4
    for metric, unit, value in (
        ("weights", "MB", weights / 1e6),
        ("buckets of gradients", "", len(model.buckets)),
        ("last bucket", "MB", model.buckets[-1] / 1e6),
        ("blocks", "", len(model.blocks)),
        ("projections of a process", "MB", contrast / 1e6),
        ("teacher", "ms", 1e3 * model.work.before),
        ("student forward", "ms", 1e3 * model.work.forward),
        ("overlap window: backward", "ms", 1e3 * model.work.backward),
    ):
        yield single_row(case, metric, unit, value, machine=machine)


def _scaling_rows(model: Model, network: Network, machine: Machine) -> Iterator[Row]:
    for engine in ("ddp", "fsdp2"):
        for ranks in RANKS:
            seconds = step_seconds(model, engine, ring_of(network, ranks))
            case = Case(
                op="projected step",
                impl=f"{model.name}, {engine}",
                mode=f"{network.name}, {ranks} ranks",
                shape=f"{model.images}x3x224x224 a process",
                dtype="bfloat16, weights and gradients float32",
            )
            for metric, unit, value in (
                ("step", "ms", 1e3 * seconds),
                ("exposed communication", "ms", 1e3 * (seconds - model.work.total)),
                ("efficiency", "share", model.work.total / seconds),
            ):
                yield single_row(case, metric, unit, value, machine=machine)
