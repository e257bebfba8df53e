"""What only a run of the real program shows: one clear line on stderr, and the exit code.

Mistakes that show in the first second are in tests/launch/test_exit_codes.py.
"""

import resource
import sys
from pathlib import Path

import pytest

QUICK = (
    *("--device", "cpu", "--set", "data.clean_fraction=1.0", "--allow-budget"),
    *("--set", "optim.epochs=2", "--set", "optim.batch_size=30"),
)


def error(err: str) -> str:
    """The last line on stderr, and the only error."""
    *before, last = err.splitlines()
    assert last.startswith("error: "), err
    assert not any(line.startswith(("error: ", "Traceback")) for line in before), err
    return last


def test_dead_tap_is_exit_3_with_its_name(program, teacher, images):
    # conv1 is real; fc is the identity on the features that timm leaves where a classifier was.
    done = program(
        "purify",
        *("--teacher", teacher, "--data", images / "train", "--out", "run", *QUICK),
        *("--set", "encoder.taps=['layer1', 'maxpool']", "--set", "encoder.stem=small_stride2"),
    )

    assert done.returncode == 3, done.stderr
    assert "'maxpool'" in error(done.stderr)
