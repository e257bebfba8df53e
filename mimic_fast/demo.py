"""The demo: a shipped backdoored encoder is measured, purified and measured again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mimic_fast.config import Settings
from mimic_fast.distil import purify
from mimic_fast.evaluation.attack_file import read_attack, write_attack
from mimic_fast.evidence import write_evidence
from mimic_fast.progress import Reporter, silent
from mimic_fast.recipe import load_settings

_PACKAGE = Path(__file__).parent
ASSETS = _PACKAGE / "assets"
RECIPE = _PACKAGE / "launch" / "recipes" / "demo.toml"


def demo_settings(out: Path, *, seed: int = 0) -> Settings:
    """The settings of the demo, from its recipe."""
    values = {
        "seed": seed,
        "encoder": {"teacher": str(ASSETS / "demo_backdoored.safetensors")},
        "evaluation": {
            "attack": str(out / "attack" / "attack.json"),
            "clean": str(ASSETS / "demo_clean.safetensors"),
            "student_only": True,
        },
        "run": {"out": str(out)},
    }
    return load_settings(RECIPE, values=values)


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    report: Reporter = silent,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Purifies the shipped encoder, trains the floor, measures all; returns the report.

    Args:
        out: Run directory, empty or absent.
        seed: Seeds everything.
        report: Told of progress.
        stop: Polled; true leaves early.

    Raises:
        UsageError: If Fashion-MNIST is neither here nor to be fetched.
        StoppedError: If ``stop`` told so.
    """
    settings = demo_settings(out, seed=seed)
    # A copy, since evaluating records the target class in it.
    write_attack(out / "attack", read_attack(ASSETS / "demo_attack"))
    result = purify(settings, report=report, stop=stop)
    return write_evidence(result, settings, report=report, stop=stop)
