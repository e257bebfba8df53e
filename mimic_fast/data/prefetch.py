"""Runs an iterator ahead of its consumer in a thread, and counts how long the consumer waited."""

import contextvars
import queue
import threading
import time
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetched(Generic[T]):
    """The items of an iterator in its order, up to ``depth`` of them made ahead.

    What the iterator raises is raised where its item would have come. The thread sees the context
    variables of the caller. Close it, or use it as a context manager: the thread then ends.

    Args:
        items: Advanced and closed in the thread only.
        depth: Items kept ready; 0: no thread, every item is made when it is asked for.
    """

    def __init__(self, items: Iterator[T], *, depth: int) -> None:
        self.waited = 0.0  # seconds, over all items
        self.waited_first: float | None = None  # of them for the first item: the backend's start
        self._items = items
        self._ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(max(1, depth))
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        if depth > 0:
            context = contextvars.copy_context()
            self._thread = threading.Thread(
                target=context.run, args=(self._work,), name="prefetch", daemon=True
            )
            self._thread.start()

    def __enter__(self) -> "Prefetched[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        began = time.perf_counter()
        try:
            if self._thread is None:
                return next(self._items)
            if self._stopped.is_set():
                raise StopIteration
            item, error = self._ready.get()
        finally:
            self.waited += time.perf_counter() - began
            if self.waited_first is None:
                self.waited_first = self.waited
        if error is not None:
            self._stopped.set()
            raise error
        return item  # pyright: ignore[reportReturnType]

    def close(self) -> None:
        """Ends the thread; items that are ready are dropped."""
        self._stopped.set()
        if self._thread is None:
            _close(self._items)
            return
        while self._thread.is_alive():
            try:
                self._ready.get_nowait()  # a thread that waits for room sees the flag
            except queue.Empty:
                self._thread.join(timeout=0.05)

    def _work(self) -> None:
        error: BaseException
        try:
            while not self._stopped.is_set():
                self._ready.put((next(self._items), None))
        except BaseException as caught:  # noqa: BLE001  # handed to the consumer
            error = caught
        else:
            error = StopIteration()
        _close(self._items)
        if not self._stopped.is_set():
            self._ready.put((None, error))


def _close(items: Iterator[object]) -> None:
    close = getattr(items, "close", None)
    if close is not None:
        close()
