"""What ``aot.py`` compiles: one kernel with the types and constants that production launches."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class AotCase:
    """One specialization.

    Args:
        name: Readable and unique, such as ``distill_fwd tokens C768 bf16 mse``.
        kernel: The ``triton.jit`` function.
        signature: Argument name to Triton type (``*bf16``, ``i32``, ``constexpr``, tuples of them).
        constants: Values of the constexpr arguments.
        divisible: Arguments divisible by 16, as the launcher would find them: ``("x_ptr",)``, or
            ``("xs", 0)`` inside a tuple.
        num_warps: Warps a program.
        most_registers: A thread may take on NVIDIA; None: the compiler decides.
        data_pointers: Arguments that point to activations, values or codes rather than to side
            tables; empty: those whose elements have fewer than 32 bits, or all if there are none.
        data: Whether 128-bit data accesses are possible; False with the reason in ``note``.
        narrow_on: Beginnings of the targets on which they are not, such as ``gfx``; empty: all.
        note: Why not, or empty.
    """

    name: str
    kernel: Any
    signature: Mapping[str, Any]
    constants: Mapping[str, Any]
    divisible: tuple[tuple[str | int, ...], ...]
    num_warps: int = 4
    most_registers: int | None = None
    data_pointers: tuple[str, ...] = ()
    data: bool = True
    narrow_on: tuple[str, ...] = ()
    note: str = ""
