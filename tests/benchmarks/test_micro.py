"""Calls a round, and rows of times, ratios and rates by the clock that decides."""

import time
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.measure import Case, Machine, Timing, cpu_clock, interleaved
from benchmarks.micro import Place, calls_per_round, rate_row, ratio_row, results_file, time_rows

CASE = Case(op="loss", impl="ours", mode="mse", shape="2x3x4")
MACHINE = Machine(device="CPU", torch="2", triton="3", commit="abc", date="2026-11-01")
CPU = Place(device="cpu", machine=MACHINE)
CUDA = Place(device="cuda", machine=MACHINE)
OWN = Timing(wall=(2.0, 1.0, 4.0), cpu=(1.0, 2.0, 1.0))
BASE = Timing(wall=(8.0, 8.0, 8.0), cpu=(3.0, 3.0, 2.0))


def figures(row: Any) -> tuple[str, str, str, str]:
    return row["metric"], row["unit"], row["p50"], row["min"]


def test_cpu_clock_gives_seconds_a_call():
    calls: list[int] = []

    wall, cpu = cpu_clock(lambda: (calls.append(1), time.sleep(0.002)), 5)

    assert len(calls) == 5
    assert 0.002 <= wall < 0.1
    assert cpu < wall


def test_interleaved_calls_each_as_often_as_it_is_told():
    calls: list[str] = []

    interleaved(
        {name: lambda name=name: calls.append(name) for name in ("a", "b")},
        rounds=2,
        warmup=0,
        calls={"a": 1, "b": 3},
    )

    assert "".join(calls) == "abbbbbba"


def test_slow_candidates_are_called_once_and_quick_ones_often():
    seconds = {"slow": 2.0, "quick": 0.01, "no time": 0.0}

    def clock(candidate, calls):
        return seconds[candidate()], seconds[candidate()]

    found = calls_per_round(
        {name: lambda name=name: name for name in seconds}, seconds=0.5, clock=clock
    )

    assert found == {"slow": 1, "quick": 50, "no time": 1000}


def test_times_are_named_by_their_clocks():
    assert [figures(row) for row in time_rows(CASE, OWN, CPU)] == [
        ("wall_time", "s", "2", "1"),
        ("cpu_time", "s", "1", "1"),
    ]
    assert [row["metric"] for row in time_rows(CASE, OWN, CUDA)] == ["gpu_time", "host_time"]


@pytest.mark.parametrize(("place", "median", "best"), [(CPU, "2", "2"), (CUDA, "4", "8")])
def test_ratio_is_taken_round_by_round_of_the_clock_that_decides(place, median, best):
    assert figures(ratio_row(CASE, "speedup", OWN, BASE, place)) == ("speedup", "x", median, best)


@pytest.mark.parametrize(("place", "median", "best"), [(CPU, "6", "6"), (CUDA, "3", "6")])
def test_rate_is_the_amount_by_the_clock_that_decides(place, median, best):
    assert figures(rate_row(CASE, "GB/s", 6.0, OWN, place)) == ("rate", "GB/s", median, best)


def test_results_are_named_by_theme_hardware_and_month():
    path = results_file("loss", "cpu")

    assert path.parent.name == "results"
    theme, hardware, month = path.stem.split("_")
    assert (theme, hardware, path.suffix) == ("loss", "cpu", ".csv")
    assert len(month) == 6
    assert month.isdigit()


def test_places_hold_what_rows_say_of_the_machine():
    (row, _) = time_rows(CASE, OWN, replace(CPU, machine=replace(MACHINE, device="CPU x")))

    assert (row["device"], row["commit"]) == ("CPU x", "abc")
