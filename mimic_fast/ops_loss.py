"""The losses of distillation: checked inputs, the path that ``ops_choice.py`` picks, the losses."""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import groupby
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mimic_fast.kernels import reference
from mimic_fast.kernels.compiled_op import register
from mimic_fast.kernels.distill import distill_losses
from mimic_fast.kernels.engine import Clone, Engine, Target, Terms, accumulator
from mimic_fast.kernels.layout import layout_of
from mimic_fast.kernels.live import LiveLosses
from mimic_fast.kernels.trunk import LayerLosses
from mimic_fast.ops_choice import Path, choose, count_call, engine


def power_maps(
    feature_maps: Sequence[Float[Tensor, "batch ..."]],
    *,
    power: float = 2.0,
    prefixes: Sequence[int] | None = None,
) -> list[Float[Tensor, "batch position"]]:
    """Unnormalized attention maps A = sum_c |F_c|^p of several layers, without gradient.

    They are all that an attention loss needs of the teacher: 4 bytes a position.

    Args:
        feature_maps: Maps ``[B, C, H, W]`` or tokens ``[B, N, C]``.
        power: p, at least 1.
        prefixes: Class and register tokens to leave out, by layer; None: none.
    """
    skipped = [0] * len(feature_maps) if prefixes is None else list(prefixes)
    maps = [feature_map.detach() for feature_map in feature_maps]
    for feature_map, prefix in zip(maps, skipped, strict=True):
        _check_activation(feature_map, prefix, power)
    if not maps:
        return []
    path = choose("distill", maps[0].device, maps[0].dtype).path
    count_call("distill", path, len(maps))
    if path in ("reference", "compiled"):
        return [
            reference.power_map(feature_map, power=power, prefix=prefix)
            for feature_map, prefix in zip(maps, skipped, strict=True)
        ]
    dense = [m if layout_of(m) is not None else m.contiguous() for m in maps]
    keys = [(m.shape, m.stride(), m.dtype, p) for m, p in zip(dense, skipped, strict=True)]
    found: list[Tensor] = []
    for (*_, prefix), members in groupby(range(len(dense)), key=keys.__getitem__):
        group = [dense[member] for member in members]
        found.extend(engine(path).power_maps(group, prefix=prefix, power=power))
    return found


def tapped_losses(
    weights: Float[Tensor, "2 layer"],
    targets: Sequence[Target | None],
    terms: Sequence[Terms],
    *,
    images: int,
    like: Tensor,
    live: frozenset[int] = frozenset(),
) -> LayerLosses | LiveLosses:
    """What a network's taps are given to, and the losses asked of, once per forward pass.

    Args:
        weights: Of attention and clone loss, by layer, on the device, in the accumulator's dtype.
        targets: The teacher's side; None: the layer has no losses.
        terms: By layer.
        images: The first images of the batch count.
        like: An activation: its device and dtype decide the path.
        live: Layers that the network changes in place after the tap.
    """
    path = choose("distill", like.device, like.dtype).path
    count_call("distill", path, sum(target is not None for target in targets))
    if path in ("reference", "compiled"):
        return LiveLosses(
            weights=weights, targets=targets, terms=terms, images=images, compute=_plain(path)
        )
    return LayerLosses(
        engine=engine(path),
        weights=weights,
        targets=targets,
        terms=terms,
        images=images,
        live=live,
    )


def layer_losses(
    students: Sequence[Float[Tensor, "batch ..."]],
    targets: Sequence[Target],
    weights: Float[Tensor, "2 layer"],
    *,
    power: float = 2.0,
    clone: Clone = "none",
    attention: bool = True,
    prefix: int = 0,
) -> list[Float[Tensor, "2 batch"]]:
    """Weighted attention and clone losses of several layers, image by image, after the forward.

    One pass reads student and teacher; ``reference.layer_losses`` has the formulas.

    Args:
        students: Activations of the student; gradients flow into them.
        targets: Activations of the teacher, or their power maps where nothing else is needed.
        weights: Of attention and clone loss, by layer.
        power: p of the attention map, at least 1.
        clone: Kind of the dense clone loss.
        attention: Whether there is an attention loss.
        prefix: Class and register tokens to leave out (tokens only).

    Raises:
        ValueError: If shapes or dtypes do not fit, or there is no image.
    """
    if not len(students) == len(targets) == weights.shape[1] or not students:
        raise ValueError(
            f"expected one target and weight a layer, got {len(students)} activations, "
            f"{len(targets)} targets and {weights.shape[1]} weights"
        )
    terms = Terms(power=power, clone=clone, attention=attention, prefix=prefix)
    for student, target in zip(students, targets, strict=True):
        _check_pair(student, target, terms)
    wide = weights.to(accumulator(students[0]))
    if torch.compiler.is_compiling() and _fused(students[0].device, students[0].dtype):
        return compiled_losses(students, targets, wide, terms)
    path: Path = "reference"
    if not torch.compiler.is_compiling():
        path = choose("distill", students[0].device, students[0].dtype).path
        count_call("distill", path, len(students))
    if path in ("reference", "compiled"):
        live = LiveLosses(
            weights=wide,
            targets=targets,
            terms=[terms] * len(students),
            images=students[0].shape[0],
            compute=_plain(path),
        )
        for number, student in enumerate(students):
            live.tap(number, student, prefix=prefix)
        return live.losses()
    return list(distill_losses(engine(path), students, targets, wide, [terms] * len(students)))


def attention_loss(
    student_map: Float[Tensor, "batch ..."],
    teacher_map: Float[Tensor, "batch ..."],
    *,
    power: float = 2.0,
    form: Literal["sum", "mean"] = "sum",
    prefix: int = 0,
) -> Float[Tensor, ""]:
    """Squared distance of normalized attention maps, averaged over the batch.

    Arguments and formula are those of ``reference.attention_loss``.
    """
    (target,) = power_maps([teacher_map], power=power, prefixes=[prefix])
    divisor = student_map.shape[0] * (target.shape[1] if form == "mean" else 1)
    weights = target.new_full((2, 1), 1 / max(1, divisor))
    (losses,) = layer_losses(
        [student_map], [Target(power=target)], weights, power=power, prefix=prefix
    )
    return losses.sum()  # the other row is 0


def clone_loss(
    student: Float[Tensor, "batch ..."],
    teacher: Float[Tensor, "batch ..."],
    *,
    kind: Literal["cosine", "mse"] = "cosine",
    prefix: int = 0,
) -> Float[Tensor, ""]:
    """Distance of student and teacher vectors, averaged over images and positions.

    Arguments and formula are those of ``reference.clone_loss``.
    """
    weights = student.new_full((2, 1), 1 / max(1, student.shape[0]), dtype=accumulator(student))
    target = Target(teacher=teacher.detach().expand_as(student).to(student.dtype))
    (losses,) = layer_losses(
        [student], [target], weights, clone=kind, attention=False, prefix=prefix
    )
    return losses.sum()  # the other row is 0


def compiled_losses(
    students: Sequence[Tensor], targets: Sequence[Target], weights: Tensor, terms: Terms
) -> list[Tensor]:
    """As ``layer_losses``, by one custom operator a layer: what torch.compile can take."""
    return [
        _OPERATOR(
            [student],
            [] if target.teacher is None else [target.teacher],
            [] if target.power is None else [target.power],
            weights[:, number : number + 1],
            terms,
        )[0]
        for number, (student, target) in enumerate(zip(students, targets, strict=True))
    ]


@torch.compiler.assume_constant_result
def _fused(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are kernels for it; asked while tracing, when nothing else may run."""
    return choose("distill", device, dtype).path in ("triton", "cpp")


def _engine_for(activation: Tensor) -> Engine:
    path = choose("distill", activation.device, activation.dtype).path
    count_call("distill", path)
    return engine(path)


_OPERATOR = register(_engine_for)


def _plain(path: Path) -> Callable[..., Tensor]:
    """The oracle, or its compiled form."""
    return _compiled_layer_losses() if path == "compiled" else reference.layer_losses


@cache
def _compiled_layer_losses() -> Callable[..., Tensor]:
    return torch.compile(reference.layer_losses)


def _check_activation(activation: Tensor, prefix: int, power: float) -> None:
    if not activation.is_floating_point():
        raise ValueError(f"expected a floating-point activation, got {activation.dtype}")
    if activation.ndim not in (2, 3, 4):
        raise ValueError(
            "expected features [B, D], tokens [B, N, C] or a map [B, C, H, W], got "
            f"{list(activation.shape)}"
        )
    if activation.numel() == 0:
        raise ValueError(f"expected at least one image, got {list(activation.shape)}")
    if not 0 <= prefix < (activation.shape[1] if activation.ndim == 3 else 1):
        raise ValueError(
            f"prefix must leave at least one token of {list(activation.shape)}, got {prefix}"
        )
    if power < 1:
        raise ValueError(f"power must be at least 1, got {power}")


def _check_pair(student: Tensor, target: Target, terms: Terms) -> None:
    _check_activation(student, terms.prefix, terms.power)
    teacher, power = target.teacher, target.power
    if teacher is None and (power is None or terms.clone != "none"):
        raise ValueError("a clone loss needs the teacher's activation, not its power map alone")
    if teacher is not None and (
        teacher.shape != student.shape
        or teacher.dtype != student.dtype
        or teacher.device != student.device
    ):
        raise ValueError(
            f"expected a teacher like the student, {list(student.shape)} {student.dtype} on "
            f"{student.device}; got {list(teacher.shape)} {teacher.dtype} on {teacher.device}"
        )
    if power is None:
        return
    expected = reference.positions(student, prefix=terms.prefix).shape[:2]
    if power.shape != expected:
        raise ValueError(
            f"expected the teacher's attention map to be {list(expected)} (batch, positions) as "
            f"the student's, got {list(power.shape)}"
        )
