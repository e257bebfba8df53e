"""The demo: a shipped backdoored encoder is measured, purified and measured again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mimic_fast.baselines.student_only import student_only
from mimic_fast.config import Settings
from mimic_fast.distil import purify
from mimic_fast.evaluation.attack_file import read_attack, write_attack
from mimic_fast.evidence import write_evidence
from mimic_fast.progress import Event, Reporter, silent
from mimic_fast.recipe import load_settings

_PACKAGE = Path(__file__).parent
ASSETS = _PACKAGE / "assets"
RECIPE = _PACKAGE / "launch" / "recipes" / "demo.toml"


def demo_settings(out: Path, *, seed: int = 0) -> Settings:
    """The settings of the demo, from its recipe."""
    values = {
        "seed": seed,
        "encoder": {"teacher": str(ASSETS / "demo_backdoored.safetensors")},
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
    result = purify(settings, report=report, stop=stop)
    # A copy, since evaluating records the target class in it.
    attack = write_attack(out / "attack", read_attack(ASSETS / "demo_attack"))
    evaluation = settings.evaluation.model_copy(update={"attack": attack})
    settings = settings.model_copy(update={"evaluation": evaluation})
    report(Event(phase="floor", message="training the student-only floor"))
    folder = settings.run.model_copy(update={"out": out / "student_only"})
    trained = result.pool[: len(result.pool) - result.clean_set.hold_out]
    floor = student_only(
        result.purified.spec,
        trained,
        settings=settings.model_copy(update={"run": folder}),
        report=report,
        stop=stop,
    )
    assert floor.path is not None
    others = {"student_only": floor.path, "clean": ASSETS / "demo_clean.safetensors"}
    return write_evidence(result, settings, others=others, report=report)
