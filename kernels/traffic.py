"""Memory traffic and extra memory as counted numbers, on a machine without a GPU.

Three context managers that nest: :func:`kernel_traffic` counts the bytes that Triton kernels move
in Triton's interpreter, :class:`AtenTraffic` those that PyTorch's own operators move, and
:class:`LiveMemory` what was allocated and is not free yet. A GPU moves these bytes as long as its
caches hold nothing from one operator to the next.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Calls of the interpreter that touch memory: position of pointers and of mask (None: no mask) among
# the arguments, and whether memory is read and written. Unmasked and descriptor accesses end here.
_ACCESSES: Mapping[str, tuple[int, int | None, bool, bool]] = {
    "create_masked_load": (0, 1, True, False),
    "create_masked_store": (0, 2, False, True),
    "create_atomic_rmw": (1, 3, True, True),
    "create_atomic_cas": (0, None, True, True),
}
# Operators that take memory or bind a tensor to some: nothing is read or written.
_FREE = frozenset(
    f"aten::{name}"
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_")
)
# Operators that do not read what they write to.
_OVERWRITING = frozenset(f"aten::{name}" for name in ("copy_", "fill_", "zero_"))


@dataclass(kw_only=True, slots=True)
class KernelTraffic:
    """What the launches of one kernel moved so far. Masked lanes move nothing.

    Args:
        launches: How often it was launched.
        loaded: Bytes read from memory; lanes with the same address count each.
        stored: Bytes written to memory. An atomic operation does both.
    """

    launches: int = 0
    loaded: int = 0
    stored: int = 0

    @property
    def total(self) -> int:
        """Bytes in both directions."""
        return self.loaded + self.stored


@contextmanager
def kernel_traffic() -> Iterator[dict[str, KernelTraffic]]:
    """Counts what Triton kernels load and store while the block runs, by the name of the kernel.

    Raises:
        RuntimeError: If Triton does not interpret its kernels in this process.
    """
    from triton import knobs
    from triton.runtime import interpreter

    if not knobs.runtime.interpret:
        raise RuntimeError(
            "the bytes of a kernel are counted in Triton's interpreter only; set "
            "TRITON_INTERPRET=1 before Triton is imported"
        )
    counted: dict[str, KernelTraffic] = defaultdict(KernelTraffic)
    running: list[KernelTraffic] = []

    def launch(run: Callable[..., Any], self: Any, *args: Any, **settings: Any) -> Any:
        running.append(counted[self.fn.__name__])
        running[-1].launches += 1
        try:
            return run(self, *args, **settings)
        finally:
            running.pop()

    with ExitStack() as replaced:
        for name, access in _ACCESSES.items():
            counter = _counting(running, *access)
            replaced.enter_context(_wrapped(interpreter.InterpreterBuilder, name, counter))
        replaced.enter_context(_wrapped(interpreter.GridExecutor, "__call__", launch))
        yield counted


class AtenTraffic(TorchDispatchMode):
    """Counts the bytes that PyTorch operators read and write while it is on.

    Every operator reads each tensor that it is given and writes each that it returns. An expanded
    dimension counts once; views are free, and so is a copy of memory onto itself (Triton's
    interpreter does that with arguments that are on the host already).

    Attributes:
        read: Bytes read so far.
        written: Bytes written so far.
        operators: How many operators moved something, the launches that a GPU would need.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read = 0
        self.written = 0
        self.operators = 0

    @property
    def total(self) -> int:
        """Bytes in both directions."""
        return self.read + self.written

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs one operator and counts it."""
        inputs = _tensors((args, kwargs))
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        updated, overwritten = _written_arguments(func, args, kwargs or {})
        storages = {tensor.untyped_storage()._cdata for tensor in inputs}
        results = _tensors(result)
        new = [item for item in results if item.untyped_storage()._cdata not in storages]
        is_view = bool(results) and not (new or updated or overwritten)
        if is_view or name in _FREE or (name == "aten::copy_" and _onto_itself(inputs)):
            return result
        shape_only = name.endswith("_like") or name.startswith("aten::new_")
        read = [] if shape_only else _without(inputs, overwritten)
        self.read += sum(map(_bytes, read))
        self.written += sum(map(_bytes, [*updated, *overwritten, *new]))
        self.operators += 1
        return result


class LiveMemory(TorchDispatchMode):
    """Follows the storages that PyTorch operators allocate while it is on, until they are freed.

    What an operator allocates and frees inside itself is not seen, nor what a custom operator does
    beyond its results.

    Attributes:
        live: Bytes allocated since the start and not freed yet.
        peak: Largest ``live`` so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs one operator and registers the storages that are new."""
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        if func._schema.name != "aten::set_":
            for tensor in _tensors(result):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._known:
                    self._follow(storage)
        self.peak = max(self.peak, self.live)
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def freed(_: object) -> None:
            self.live -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)
        self.live += size


def _counting(
    running: list[KernelTraffic], pointers: int, mask: int | None, reads: bool, writes: bool
) -> Callable[..., Any]:
    """A wrapper of one kind of access; the arguments are those of :data:`_ACCESSES`."""

    def access(run: Callable[..., Any], self: Any, *args: Any, **settings: Any) -> Any:
        lanes = args[pointers].data.size if mask is None else args[mask].data.sum()
        bits = args[pointers].get_element_ty().primitive_bitwidth
        moved = int(lanes) * max(8, bits) // 8
        running[-1].loaded += moved if reads else 0
        running[-1].stored += moved if writes else 0
        return run(self, *args, **settings)

    return access


@contextmanager
def _wrapped(owner: type, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """``owner.name`` becomes ``wrapper`` with the original method as its first argument."""
    original = getattr(owner, name)

    def method(self: Any, *args: Any, **settings: Any) -> Any:
        return wrapper(original, self, *args, **settings)

    setattr(owner, name, method)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _without(tensors: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    return [tensor for tensor in tensors if not any(tensor is other for other in others)]


def _written_arguments(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """Arguments that the operator writes to: those that it reads before, and those it does not."""
    updated, overwritten = list[object](), list[object]()
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            unread = argument.kwarg_only or func._schema.name in _OVERWRITING  # out=
            given = args[index] if index < len(args) else kwargs.get(argument.name)
            (overwritten if unread else updated).append(given)
    return _tensors(updated), _tensors(overwritten)


def _onto_itself(tensors: list[Tensor]) -> bool:
    return len({tensor.data_ptr() for tensor in tensors}) == 1


def _bytes(tensor: Tensor) -> int:
    """Memory that the tensor spans; an expanded dimension holds each element once."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return 0 if tensor.numel() == 0 else torch.Size(sizes).numel() * tensor.element_size()
