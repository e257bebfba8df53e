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
