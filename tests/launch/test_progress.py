import os
import re
from collections.abc import Iterator

import pytest

from mimic_fast.launch.progress import progress_bars
from mimic_fast.progress import Event, Reporter


@pytest.fixture(autouse=True)
def wide_terminal_on_rank_0(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")  # rich takes a dumb terminal for 80 columns wide
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("RANK", raising=False)


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """The two ends of a pseudo-terminal."""
    ends = os.openpty()
    yield ends
    for end in ends:
        os.close(end)


def tell(report: Reporter) -> None:
    report(Event(phase="load", message="300 images of [folder]"))
    report(Event(phase="locate", done=64, total=300, unit="images"))
    report(Event(phase="locate", done=300, total=300, unit="images"))
    metrics = {"images_per_second": 1234.4, "loss": 0.12345, "clone": -0.5}
    report(Event(phase="distil", done=5, total=40, unit="steps", metrics=metrics))


def drawn(terminal: tuple[int, int], *, after: float, tell=tell) -> str:
    """What ``tell`` leaves on the terminal, without control sequences."""
    master, slave = terminal
    with (
        open(slave, "w", closefd=False) as stream,
        progress_bars(stream=stream, after=after) as report,
    ):
        tell(report)
    os.set_blocking(master, False)
    text = b""
    try:
        while block := os.read(master, 65536):
            text += block
    except BlockingIOError:
        pass
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.decode())


def test_bars_show_counts_rate_and_metrics_on_a_terminal(terminal):
    text = drawn(terminal, after=0.0)

    assert "300 images of [folder]" in text
    assert re.search(r"locate +\S+ +300/300 +[\d.]+ images/s", text)
    assert re.search(r"distil +\S+.* +5/40 +1234 images/s .*loss 0.123 clone -0.5", text)


def test_metrics_that_do_not_fit_are_left_out(terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    text = drawn(terminal, after=0.0)

    assert re.search(r"distil +\S+.* +5/40 +1234 images/s .*loss 0.123", text)
    assert "clone" not in text


def train(report: Reporter) -> None:
    report(Event(phase="locate", done=3000, total=3000, unit="images"))
    metrics = {
        "images_per_second": 1234.4,
        "loss": 0.12345,
        "clone": -0.5,
        "lr": 0.001,
        "images_per_second_per_process": 617.2,
        "data_wait": 0.034,
        "teacher_ms": 12.3,
        "student_ms": 104.4,
    }
    report(Event(phase="distil", done=5, total=40, unit="steps", metrics=metrics))


def test_what_a_step_costs_comes_before_parts_of_the_loss(terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")

    text = drawn(terminal, after=0.0, tell=train)

    assert re.search(r"distil +\S+.* +5/40 +1234 images/s ", text)
    assert "loss 0.123 wait 3% lr 0.001 617/s each teacher 12 ms student 104 ms clone -0.5" in text


@pytest.mark.parametrize("columns", [30, 50, 70, 80, 90, 100, 120, 140])
def test_no_line_is_wider_than_the_terminal(terminal, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))

    lines = drawn(terminal, after=0.0, tell=train).replace("\r", "\n").splitlines()

    assert max(map(len, lines)) <= columns
    assert "1234 images/s" in lines[-2]


@pytest.mark.parametrize(
    ("columns", "end"),
    [(50, "--:--"), (80, "wait 3%"), (90, "lr 0.001"), (120, "teacher 12 ms")],
)
def test_no_number_is_cut(terminal, monkeypatch, columns, end):
    monkeypatch.setenv("COLUMNS", str(columns))

    line = drawn(terminal, after=0.0, tell=train).replace("\r", "\n").splitlines()[-2]

    assert line.rstrip().endswith(end)


def test_no_time_is_told_of_a_teacher_that_there_is_none(terminal):
    def alone(report: Reporter) -> None:
        metrics = {"images_per_second": 3.21, "teacher_ms": 0.0, "student_ms": 7.5}
        report(Event(phase="train", done=5, total=40, unit="steps", metrics=metrics))

    text = drawn(terminal, after=0.0, tell=alone)

    assert "3.2 images/s" in text
    assert "student 7.5 ms" in text
    assert "teacher" not in text


def test_short_phases_get_no_bar(terminal):
    assert drawn(terminal, after=60.0).split() == ["300", "images", "of", "[folder]"]


def test_a_phase_that_starts_over_gets_a_fresh_bar(terminal):
    def twice(report: Reporter) -> None:
        for done in (50, 100, 10):
            report(Event(phase="evaluate", done=done, total=100, unit="images"))

    last = drawn(terminal, after=0.0, tell=twice).strip().splitlines()[-1]

    assert re.search(r"evaluate +\S+.* +10/100", last)


def test_only_messages_where_there_is_no_terminal(tmp_path):
    path = tmp_path / "log"

    with path.open("w") as stream, progress_bars(stream=stream, after=0.0) as report:
        tell(report)

    assert path.read_text() == "300 images of [folder]\n"


def test_other_ranks_are_silent(terminal, monkeypatch):
    monkeypatch.setenv("RANK", "1")

    assert drawn(terminal, after=0.0) == ""
