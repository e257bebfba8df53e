import contextlib
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mimic_fast import step_clock
from mimic_fast.config import EncoderSpec
from mimic_fast.encoders.build import build_encoder
from mimic_fast.encoders.taps import Listener, TappedEncoder
from mimic_fast.step_clock import SECTIONS, StepClock, listener_timed

CPU = torch.device("cpu")


class Hand:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def hand(monkeypatch) -> Hand:
    hand = Hand()
    monkeypatch.setattr(step_clock, "time", SimpleNamespace(perf_counter=hand.perf_counter))
    return hand


class Events:
    """Marks that a device reaches later than the host leaves them."""

    made: list["Events"] = []  # noqa: RUF012

    def __init__(self, device: torch.device) -> None:
        self.device, self.left, self.waited, self.freed = device, 0, [], []
        self.made.append(self)

    def mark(self) -> list[int]:
        mark = self.freed.pop() if self.freed else []
        mark[:] = [self.left]
        self.left += 1
        return mark

    def wait(self, last: list[int]) -> None:
        self.waited.append(last[0])

    def seconds(self, first: list[int], second: list[int]) -> float:
        assert self.waited
        return float(second[0] - first[0])

    def free(self, marks: list[list[int]]) -> None:
        self.freed += marks


def test_a_step_is_divided_among_its_sections(hand):
    clock = StepClock(CPU)
    clock.begin()
    with clock.section("data"):
        hand.pass_by(1.0)
    hand.pass_by(0.25)
    for seconds in (2.0, 3.0):
        with clock.section("teacher"):
            hand.pass_by(seconds)
    clock.step_done()

    assert clock.read() == [{"seconds": 6.25, "data": 1.0, "teacher": 5.0}]
    assert clock.read() == []


def test_an_inner_section_is_taken_off_the_outer_one(hand):
    clock = StepClock(CPU)
    clock.begin()
    with clock.section("student"):
        hand.pass_by(1.0)
        with clock.section("loss"):
            hand.pass_by(2.0)
            with clock.section("communication"):
                hand.pass_by(4.0)
            hand.pass_by(8.0)
        hand.pass_by(16.0)
    clock.step_done()

    (row,) = clock.read()

    assert row == {"seconds": 31.0, "student": 17.0, "loss": 10.0, "communication": 4.0}


def test_steps_follow_each_other_without_a_gap(hand):
    clock = StepClock(CPU)
    hand.pass_by(50.0)  # before the first step
    clock.begin()
    for seconds in (1.0, 2.0, 3.0):
        hand.pass_by(seconds)
        clock.step_done()
    hand.pass_by(9.0)  # of a step that is not done

    assert [row["seconds"] for row in clock.read()] == [1.0, 2.0, 3.0]
    clock.step_done()
    assert [row["seconds"] for row in clock.read()] == [9.0]


def test_a_section_that_raises_is_closed(hand):
    clock = StepClock(CPU)
    clock.begin()
    with contextlib.suppress(ValueError), clock.section("backward"):
        hand.pass_by(1.0)
        raise ValueError
    hand.pass_by(2.0)
    clock.step_done()

    assert clock.read() == [{"seconds": 3.0, "backward": 1.0}]


def test_begin_forgets_a_step_that_was_not_done(hand):
    clock = StepClock(CPU)
    clock.begin()
    with clock.section("data"):
        hand.pass_by(1.0)
    clock.begin()
    hand.pass_by(2.0)
    clock.step_done()

    assert clock.read() == [{"seconds": 2.0}]


def test_nothing_is_counted_before_the_beginning(hand):
    clock = StepClock(CPU)
    with clock.section("teacher"):
        hand.pass_by(1.0)
    clock.begin()
    hand.pass_by(2.0)
    clock.step_done()

    assert clock.read() == [{"seconds": 2.0}]


def test_a_step_needs_a_beginning():
    with pytest.raises(RuntimeError, match="begin"):
        StepClock(CPU).step_done()


def test_the_real_clock_agrees_with_a_wait():
    clock = StepClock(CPU)
    clock.begin()
    with clock.section("data"):
        time.sleep(0.02)
    clock.step_done()

    (row,) = clock.read()

    assert 0.02 <= row["data"] <= row["seconds"] < 1


# By processor time, without the checks of types that tests add.
COST = """
import time, torch
from mimic_fast.step_clock import StepClock

clock, costs = StepClock(torch.device("cpu")), []
clock.begin()
for _ in range(20):
    start = time.process_time()
    for _ in range(1000):
        with clock.section("student"), clock.section("loss"):
            pass
    clock.step_done()
    clock.read()
    costs.append((time.process_time() - start) / 2000)
print(min(costs))
"""


def test_a_section_costs_less_than_20_microseconds():
    done = subprocess.run([sys.executable, "-c", COST], capture_output=True, text=True, check=True)

    assert float(done.stdout) < 20e-6


def test_on_a_device_nothing_waits_before_reading_and_events_are_used_again(monkeypatch):
    monkeypatch.setattr(step_clock, "_Events", Events)
    clock = StepClock(torch.device("cuda", 0))
    events = Events.made[-1]
    rows: list[dict[str, float]] = []
    for _ in range(3):
        clock.begin()
        for _ in range(2):
            with clock.section("student"), clock.section("loss"):
                pass
            clock.step_done()
        assert len(events.waited) == len(rows) // 2
        rows += clock.read()
        assert len({id(mark) for mark in events.freed}) == len(events.freed)

    assert rows == [{"seconds": 5.0, "student": 2.0, "loss": 1.0}] * 6
    assert len(events.freed) == 10  # as many as two steps take: the rounds after make no new ones


class Doubling:
    """A listener that takes its time."""

    def __init__(self, hand: Hand) -> None:
        self.hand, self.heard = hand, []

    def tap(self, index: int, activation: Tensor, *, prefix: int = 0) -> Tensor:
        self.hand.pass_by(1.0)
        self.heard.append((index, prefix))
        return activation * 2


def test_work_at_the_taps_is_loss_not_student(hand):
    spec = EncoderSpec(
        architecture="timm:vit_tiny_patch16_224",
        arguments={"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2},
        image_size=16,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )
    tapped = TappedEncoder(build_encoder(spec, seed=3).eval(), ("blocks.0", "blocks.1"))
    images = torch.rand(2, 3, 16, 16)
    plain, timed = Doubling(hand), Doubling(hand)
    clock = StepClock(CPU)
    clock.begin()
    listener: Any = listener_timed(timed, clock)

    with clock.section("student"):
        hand.pass_by(10.0)
        features = tapped.listened(images, listener)
    clock.step_done()

    assert clock.read() == [{"seconds": 12.0, "student": 10.0, "loss": 2.0}]
    assert timed.heard == [(0, 1), (1, 1)]
    torch.testing.assert_close(features, tapped.listened(images, plain), rtol=0, atol=0)
    assert isinstance(listener, Listener)


def test_no_listener_is_no_listener():
    assert listener_timed(None, StepClock(CPU)) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_device_time_of_a_section_is_the_device_s_own():
    clock = StepClock(torch.device("cuda"))
    clock.begin()
    start = time.perf_counter()
    with clock.section("student"):
        torch.cuda._sleep(200_000_000)
    with clock.section("data"):  # the host looks for a batch while the device works
        time.sleep(0.01)
    clock.step_done()
    host = time.perf_counter() - start
    torch.cuda.synchronize()

    (row,) = clock.read()

    assert host < row["student"]
    assert row["data"] < 0.005
    assert set(row) <= {"seconds", *SECTIONS}
