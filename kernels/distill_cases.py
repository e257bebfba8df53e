"""Every kernel and specialization of the fused distillation loss that production launches.

Shapes are those of common encoders: ViT-Ti to g/14, ResNets with maps of 7 to 56 a side, and what
``layout.py`` makes of them in both memory formats. Made from the plans of the launchers.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from mimic_fast.kernels.aot_case import AotCase
from mimic_fast.kernels.distill_plan import (
    Clone,
    Plan,
    plan_backward,
    plan_forward,
    plan_powers,
)
from mimic_fast.kernels.layout import Layout

LAYERS = 4
ITEM_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
TOKENS = (  # N without the class token, C; also maps in channels_last
    *((196, channels) for channels in (192, 384, 768)),
    *((256, channels) for channels in (1024, 1280, 1408, 1536)),
    *((3136, 64), (784, 128), (196, 1024), (49, 2048), (16, 512), (49, 768)),
)
FEATURES = (192, 512, 768, 2048)  # D
MAPS = (  # HW, C in NCHW
    *((3136, 64), (3136, 256), (1024, 64), (784, 128), (784, 512), (256, 128), (196, 256)),
    *((196, 1024), (64, 256), (49, 512), (49, 2048), (16, 512), (4, 512)),
)
SIDE_TYPES = {
    "weights_ptr": "*fp32",
    "losses_ptr": "*fp32",
    "powers_ptr": "*fp32",
    "coefficients_ptr": "*fp32",
    "grads_ptr": "*fp32",
    **dict.fromkeys(("weight_row", "weight_column", "weight_stride"), "i32"),
    **dict.fromkeys(("grad_row", "grad_image", "channels", "steps"), "i32"),
}


def aot_cases() -> list[AotCase]:
    """Specializations for ``aot.py``."""
    cases: list[AotCase] = []
    for dtype in ITEM_SIZES:
        for layout in _layouts():
            cases += _layer_cases(layout, dtype)
        for width in FEATURES:
            layout = _tokens(1, width, first=0)
            cases += _clone_cases(layout, dtype)
        for layout in (_tokens(196, 768, first=1), _planes(49, 512)):
            cases += _rare_cases(layout, dtype)
    return cases


def _layouts() -> Iterator[Layout]:
    for positions, channels in TOKENS:
        yield _tokens(positions, channels, first=int(positions in (196, 256)))
    for positions, channels in MAPS:
        yield _planes(positions, channels)


def _tokens(positions: int, channels: int, *, first: int) -> Layout:
    return Layout(
        kind="tokens",
        images=2,
        positions=positions,
        channels=channels,
        stride_image=(first + positions) * channels,
        stride_position=channels,
        stride_channel=1,
        start=0,
    )


def _planes(positions: int, channels: int) -> Layout:
    return Layout(
        kind="planes",
        images=2,
        positions=positions,
        channels=channels,
        stride_image=positions * channels,
        stride_position=1,
        stride_channel=positions,
        start=0,
    )


def _layer_cases(layout: Layout, dtype: str) -> Iterator[AotCase]:
    """What a step launches of a layer: attention alone, or with a dense clone loss."""
    yield _powers(layout, dtype, power=2.0)
    yield _forward(layout, dtype, given=True)
    yield _backward(layout, dtype, trunk=True)
    for clone in ("mse", "cosine"):
        yield _forward(layout, dtype, clone=clone)
        yield _backward(layout, dtype, clone=clone, trunk=True)


def _clone_cases(layout: Layout, dtype: str) -> Iterator[AotCase]:
    """Features and layers without an attention loss."""
    for clone in ("mse", "cosine"):
        yield _forward(layout, dtype, clone=clone, attention=False)
        yield _backward(layout, dtype, clone=clone, attention=False, trunk=False)


def _rare_cases(layout: Layout, dtype: str) -> Iterator[AotCase]:
    """Other powers, the last layer, one layer or many, teachers' maps made on the way."""
    yield from _clone_cases(layout, dtype)
    yield _forward(layout, dtype)
    yield _forward(layout, dtype, given=True, layers=1)
    yield _forward(layout, dtype, given=True, layers=24)
    for clone in ("none", "mse", "cosine"):
        yield _backward(layout, dtype, clone=clone, trunk=False)
    for power in (1.0, 1.5, 3.0, 4.0):
        yield _powers(layout, dtype, power=power)
        yield _forward(layout, dtype, power=power, given=True)
        yield _forward(layout, dtype, power=power, clone="cosine")
        yield _backward(layout, dtype, power=power, clone="cosine", trunk=True)


def _powers(layout: Layout, dtype: str, *, power: float) -> AotCase:
    plan = plan_powers((layout,) * LAYERS, ITEM_SIZES[dtype], power=power)
    types = {"features": (f"*{dtype}",) * LAYERS}
    return _case(f"powers {_named(layout, dtype, power)}", plan, types)


def _forward(
    layout: Layout,
    dtype: str,
    *,
    clone: Clone = "none",
    attention: bool = True,
    given: bool = False,
    power: float = 2.0,
    layers: int = LAYERS,
) -> AotCase:
    plan = plan_forward(
        (layout,) * layers,
        (layout,) * layers,
        ITEM_SIZES[dtype],
        power=power,
        clone=clone,
        attention=attention,
        given=given,
    )
    name = f"forward {_named(layout, dtype, power)} {clone}{' attention' * attention}"
    name += f"{' given' * given}{f' L{layers}' * (layers != LAYERS)}"
    return _case(name, plan, dict.fromkeys(("students", "teachers"), (f"*{dtype}",) * layers))


def _backward(
    layout: Layout,
    dtype: str,
    *,
    clone: Clone = "none",
    attention: bool = True,
    trunk: bool,
    power: float = 2.0,
) -> AotCase:
    plan = plan_backward(
        layout,
        layout,
        ITEM_SIZES[dtype],
        power=power,
        clone=clone,
        attention=attention,
        trunk=trunk,
    )
    name = f"backward {_named(layout, dtype, power)} {clone}{' attention' * attention}"
    pointers = ("student_ptr", "teacher_ptr", "trunk_ptr", "out_ptr")
    return _case(name + " trunk" * trunk, plan, dict.fromkeys(pointers, f"*{dtype}"))


def _named(layout: Layout, dtype: str, power: float) -> str:
    name = f"{layout.kind} N{layout.positions} C{layout.channels} {dtype}"
    return name + f" p{power:g}" * (power != 2)


def _case(name: str, plan: Plan, types: Mapping[str, Any]) -> AotCase:
    """Activations begin at multiples of 16 bytes, as every allocation and C % 8 == 0 have it."""
    divisible: list[tuple[str | int, ...]] = []
    for pointer, kind in types.items():
        inner = range(len(kind)) if isinstance(kind, tuple) else [None]
        divisible += [(pointer,) if index is None else (pointer, index) for index in inner]
    every = {**types, **SIDE_TYPES}
    return AotCase(
        name=f"distill {name}",
        kernel=plan.kernel,
        signature={
            argument: every.get(argument, "constexpr") for argument in plan.kernel.arg_names
        },
        constants=plan.constants,
        divisible=tuple(divisible),
        num_warps=plan.num_warps,
        most_registers=plan.most_registers,
        data_pointers=tuple(types),
        data=not plan.note,
        note=plan.note,
    )
