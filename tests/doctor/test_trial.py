"""Trials end: with a result, with the error's own words, or killed."""

import os
import time
from pathlib import Path

import pytest

from mimic_fast.doctor import engines
from mimic_fast.doctor.finding import refused
from mimic_fast.doctor.trial import Trial, _reason
from mimic_fast.errors import UsageError


def pair(folder: Path, *, seconds: int, ranks: tuple[int, ...] = (0, 1)) -> Trial:
    calls = [("gloo", str(folder / "store"), rank) for rank in ranks]
    return Trial("all_reduce", calls, seconds=seconds)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_process_whose_partner_never_comes_is_killed_in_time(tmp_path):
    began = time.monotonic()
    trial = pair(tmp_path, seconds=3, ranks=(0,))
    pids = [process.pid for process in trial._processes]

    needed = engines.all_reduce("gloo", trial, needed=True)

    assert time.monotonic() - began < 5
    assert needed.level == "FAILED"
    assert needed.seen == "not done after 3 s"
    assert "GLOO_SOCKET_IFNAME" in needed.todo
    assert not any(alive(pid) for pid in pids)


def test_error_of_a_process_is_told_in_its_own_words(settings, tmp_path):
    text = settings(f"data.source={tmp_path / 'nowhere'}").model_dump_json()

    outcome = Trial("data_opens", [(text, 1)], seconds=60).outcome()

    assert not outcome.worked
    assert outcome.said.startswith("data source '")
    assert "nowhere' does not exist; give an image folder" in outcome.said


@pytest.mark.parametrize(
    ("stderr", "code", "expected"),
    [
        ("Traceback ...\n  File\nValueError: expected 1\n", 1, "expected 1"),
        ("a.b.UsageError: gone; give it\n\nnoise after\n", 1, "gone; give it"),
        ("ERROR: loader: no such library\n", 1, "ERROR: loader: no such library"),
        ("", 3, "exit code 3"),
        ("anything", -11, "killed by SIGSEGV"),
    ],
)
def test_reason_is_the_message_without_its_traceback(stderr, code, expected):
    assert _reason(stderr, code) == expected


def test_refusal_is_split_into_what_is_seen_and_what_to_do():
    finding = refused("teacher", UsageError("there are two\nof it; give one; or none"))

    assert finding.seen == "there are two of it"
    assert finding.todo == "give one; or none"
