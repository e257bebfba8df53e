"""Which module first put out a number that is not finite, and which tensors hold such numbers."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mimic_fast.encoders.taps import TappedEncoder
from mimic_fast.step import Student

Role = Literal["teacher", "student", "projection"]
_ENCODER = "tapped.encoder.backbone."


@dataclass(frozen=True, kw_only=True, slots=True)
class NotFinite:
    """Something that holds values that are not finite.

    Args:
        role: Whose it is.
        name: Module or parameter, as ``mimic-fast inspect`` names it; empty: the whole network.
        count: Values that are not finite.
        total: Values in all.
    """

    role: Role
    name: str
    count: int
    total: int


@contextmanager
def first_not_finite(student: Student, teacher: TappedEncoder | None) -> Iterator[list[NotFinite]]:
    """Gives a list that gets at most one entry while modules of teacher and student run.

    The first is the first to finish: of a block whose convolution overflows, the convolution.
    """
    found: list[NotFinite] = []
    networks: dict[str, nn.Module] = {"student": student}
    if teacher is not None:
        networks["teacher"] = nn.ModuleDict({"tapped": teacher})
    with ExitStack() as hooks:
        for owner, network in networks.items():
            for path, module in network.named_modules():

                def look(_: nn.Module, __: Any, output: Any, name: str = path, of: str = owner):
                    if found:
                        return
                    values = [t for t in _tensors(output) if t.is_floating_point()]
                    bad = sum(_count(tensor) for tensor in values)
                    if bad:
                        role, short = _named(name, "teacher" if of == "teacher" else "student")
                        total = sum(tensor.numel() for tensor in values)
                        found.append(NotFinite(role=role, name=short, count=bad, total=total))

                hooks.callback(module.register_forward_hook(look).remove)
        yield found


def not_finite(tensors: Mapping[str, Tensor]) -> tuple[NotFinite, ...]:
    """Those of a student's tensors, by their names in its state, that hold such values."""
    found = []
    for path, tensor in tensors.items():
        if tensor.is_floating_point() and (bad := _count(tensor)):
            role, name = _named(path, "student")
            found.append(NotFinite(role=role, name=name, count=bad, total=tensor.numel()))
    return tuple(found)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from (t for value in output.values() for t in _tensors(value))
    elif isinstance(output, list | tuple):
        yield from (t for value in output for t in _tensors(value))


def _named(path: str, role: Role) -> tuple[Role, str]:
    """A path inside :class:`Student` as users know it: relative to backbone or projection."""
    if path.startswith("projection"):
        return "projection", path.removeprefix("projection").lstrip(".")
    return role, path.removeprefix(_ENCODER) if path.startswith(_ENCODER) else ""


def _count(tensor: Tensor) -> int:
    return int((~torch.isfinite(tensor)).sum())
