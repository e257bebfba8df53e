import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar

import pytest

from mimic_fast.data.prefetch import Prefetched

DEPTHS = [0, 1, 3]
TAG: ContextVar[str] = ContextVar("tag", default="none")


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("count", [0, 1, 20])
def test_items_come_in_order_and_end(depth, count):
    with Prefetched(iter(range(count)), depth=depth) as items:
        assert list(items) == list(range(count))
        assert list(items) == []


@pytest.mark.parametrize("depth", DEPTHS)
def test_an_error_comes_where_its_item_would(depth):
    def broken() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("third")

    with Prefetched(broken(), depth=depth) as items:
        assert [next(items), next(items)] == [1, 2]
        with pytest.raises(ValueError, match="third"):
            next(items)


@pytest.mark.parametrize("depth", DEPTHS)
def test_closing_early_ends_the_iterator_and_its_thread(depth):
    closed = threading.Event()

    def endless() -> Iterator[int]:
        try:
            number = 0
            while True:
                yield (number := number + 1)
        finally:
            closed.set()

    before = threading.active_count()
    with Prefetched(endless(), depth=depth) as items:
        assert next(items) == 1

    assert closed.wait(5)
    assert threading.active_count() == before


def test_no_more_than_depth_and_one_are_made_ahead():
    made: list[int] = []

    def counted() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    with Prefetched(counted(), depth=3) as items:
        next(items)
        deadline = time.monotonic() + 5
        while len(made) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(made) == 5  # one taken, three ready, one in hand


def test_waiting_is_counted_and_work_ahead_is_not():
    def slow() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.1)
            yield number

    with Prefetched(slow(), depth=2) as items:
        time.sleep(0.5)
        assert list(items) == [0, 1, 2]
        assert items.waited < 0.1
    with Prefetched(slow(), depth=0) as items:
        assert list(items) == [0, 1, 2]
        assert items.waited > 0.25
        assert 0.08 < (items.waited_first or 0) < items.waited


def test_the_thread_sees_the_context_of_the_caller():
    token = TAG.set("ours")
    try:
        with Prefetched((TAG.get() for _ in range(1)), depth=1) as items:
            assert next(items) == "ours"
    finally:
        TAG.reset(token)
