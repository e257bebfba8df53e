"""What a check found."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "FAILED"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One line of the doctor.

    Args:
        name: What was checked.
        level: ``FAILED``: the recipe cannot run here, or nothing can.
        seen: What is there.
        todo: What to do about it; empty where all is well.
    """

    name: str
    level: Level
    seen: str
    todo: str = ""


def ok(name: str, seen: str) -> Finding:
    """All is well."""
    return Finding(name=name, level="ok", seen=seen)


def warning(name: str, seen: str, todo: str) -> Finding:
    """It runs without, or slower, or could not be told."""
    return Finding(name=name, level="warning", seen=seen, todo=todo)


def failed(name: str, seen: str, todo: str) -> Finding:
    """It does not run."""
    return Finding(name=name, level="FAILED", seen=seen, todo=todo)


def refused(name: str, error: Exception) -> Finding:
    """A check that a run would make refused; our errors say what to do after a semicolon."""
    seen, _, todo = " ".join(str(error).split()).partition("; ")
    return failed(name, seen, todo)
