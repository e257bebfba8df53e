"""Bytes of live tensors over one training step, operation by operation.

A storage counts from the operation that first returns it until it is let go, as an allocator has
it. Views cost nothing. What an operation allocates and frees inside itself is not seen.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """What was alive after each operation of a step, bytes.

    Args:
        live: All storages.
        gradients: Of them those of parameters' gradients.
        update_from: The operation with which the optimizer's part begins.
    """

    live: tuple[int, ...]
    gradients: tuple[int, ...]
    update_from: int


class LiveBytes(TorchDispatchMode):
    """Counts storages while it is active; what was there before is given to :meth:`hold`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self._sizes: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._gradients: set[int] = set()
        self._in_gradients = 0
        self._history: list[tuple[int, int]] = []
        self._update_from = 0

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that are alive already."""
        for tensor in tensors:
            self._see(tensor)

    def watch_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Tells gradients of these parameters from other storages."""
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._mark)

    def start(self) -> None:
        """Begins a step."""
        self._history, self._update_from = [(self.now, self._in_gradients)], 0

    def start_update(self) -> None:
        """Tells that forward and backward of the step are done."""
        self._update_from = len(self._history)

    def trace(self) -> Trace:
        """What was seen since :meth:`start`."""
        live, gradients = zip(*self._history, strict=True)
        return Trace(live=live, gradients=gradients, update_from=self._update_from)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and counts what it returned."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        self._history.append((self.now, self._in_gradients))
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._sizes:
            return
        size = storage.nbytes()
        self._sizes[address] = weakref.ref(storage, lambda _: self._forget(address)), size
        self.now += size

    def _forget(self, address: int) -> None:
        _, size = self._sizes.pop(address)
        self.now -= size
        if address in self._gradients:
            self._gradients.remove(address)
            self._in_gradients -= size

    def _mark(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        address = parameter.grad.untyped_storage()._cdata
        if address in self._sizes and address not in self._gradients:
            self._gradients.add(address)
            self._in_gradients += self._sizes[address][1]
