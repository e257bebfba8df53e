"""``mimic-fast evaluate``: accuracy and attack success rate of any encoders on any labeled set."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mimic_fast.errors import UsageError
from mimic_fast.launch.arguments import (
    AttackFiles,
    Device,
    Downstream,
    Json,
    Out,
    Overrides,
    Recipe,
    Seed,
    attack_values,
    downstream_values,
    given,
    named,
    print_json,
)


def evaluate(
    recipe: Recipe = None,
    encoder: Annotated[
        list[str] | None,
        typer.Option(
            "--encoder",
            metavar="[ROLE=]FILE",
            help="Checkpoint to measure; roles teacher, purified, student_only and clean are "
            "compared. Repeatable.",
        ),
    ] = None,
    downstream: Downstream = None,
    attack: AttackFiles = None,
    out: Out = None,
    seed: Seed = None,
    device: Device = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Measure encoders on labeled sets: clean accuracy, attack success rate, robust accuracy.

    With --out, report.json and report.html are written there. In the run directory of a
    purification of the same encoders its report is brought up to date.
    """
    from mimic_fast.recipe import load_settings, settings_record

    values = {
        **given(seed=seed),
        "run": given(device=device),
        "evaluation": given(downstream=downstream_values(downstream), attack=attack_values(attack)),
    }
    settings = load_settings(recipe, overrides=overrides or (), values=values)
    files = _files(encoder)
    if not settings.evaluation.downstream:
        raise UsageError("nothing to measure on; give --downstream NAME=DIR with train and test")

    # torch only now, so that a mistake in the settings shows at once
    from mimic_fast.encoders.ingest import load_encoder
    from mimic_fast.evaluation.evaluate import evaluate_encoders
    from mimic_fast.evaluation.features import place
    from mimic_fast.launch.memory import keep_freed_memory
    from mimic_fast.launch.progress import progress_bars
    from mimic_fast.launch.tables import print_report
    from mimic_fast.report.collect import write_report
    from mimic_fast.report.draw import draw_figures
    from mimic_fast.report.examples import load_examples
    from mimic_fast.report.figures import save_figures

    keep_freed_memory()
    loaded = {role: load_encoder(path, settings.encoder) for role, path in files.items()}
    place((one.encoder for one in loaded.values()), settings.run)
    earlier = {} if out is None else _earlier(out, {r: e.sha256 for r, e in loaded.items()})
    with progress_bars() as report:
        measured = evaluate_encoders(loaded, settings.evaluation, seed=settings.seed, report=report)
    figures: list[dict[str, str]] = []
    if out is not None:
        drawn = draw_figures(
            {role: one.encoder for role, one in loaded.items()},
            measured,
            settings.evaluation,
            seed=settings.seed,
            taps=settings.encoder.taps,
            power=settings.loss.attention_power,
        )
        figures = save_figures(out, drawn)
    content = _content(measured, settings_record(settings), earlier, figures)
    if out is not None:
        spec = next(iter(loaded.values())).encoder.spec
        examples = load_examples(
            measured, settings.evaluation, image_size=spec.image_size, channels=spec.in_channels
        )
        curves = out / "metrics.jsonl"
        write_report(out, content, metrics=curves if curves.exists() else None, examples=examples)
    if as_json:
        print_json(content)
    else:
        print_report(content)
        if out is not None:
            typer.echo(f"report: {out / 'report.html'}")


def _files(items: list[str] | None) -> dict[str, Path]:
    if not items:
        raise UsageError("no encoder given; use --encoder ROLE=FILE")
    files: dict[str, Path] = {}
    for item in items:
        role, path = named(item, "--encoder") if "=" in item else ("encoder", item)
        if role in files:
            raise UsageError(f"two encoders are called '{role}'; give each --encoder its own ROLE=")
        files[role] = Path(path)
    return files


def _earlier(out: Path, digests: dict[str, str]) -> dict[str, Any]:
    """The report that is there already, if it is about these encoders."""
    path = out / "report.json"
    if not path.exists():
        return {}
    try:
        report = json.loads(path.read_bytes())
        known = {role: encoder["sha256"] for role, encoder in report["encoders"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{path} is not a report of ours; use another --out") from None
    if any(known.get(role, digest) != digest for role, digest in digests.items()):
        raise UsageError(f"{path} is about other encoders; use another --out")
    if missing := sorted(set(known) - set(digests)):
        raise UsageError(
            f"{path} also holds the figures of {', '.join(missing)}, which would be lost; give "
            "these encoders too, or another --out"
        )
    return report


def _content(
    measured: dict[str, Any],
    settings: dict[str, Any],
    earlier: dict[str, Any],
    figures: list[dict[str, str]],
) -> dict[str, Any]:
    """The new report, with what only the purification itself could measure carried over."""
    from mimic_fast.evaluation.metrics import Measure
    from mimic_fast.report.collect import RunFacts, build_report

    new = {figure["name"] for figure in figures}
    kept = [figure for figure in earlier.get("figures", ()) if figure.get("name") not in new]
    agreement = {name: Measure(**m) for name, m in earlier.get("agreement", {}).items()}
    if "settings" in earlier:
        settings = earlier["settings"] | {"evaluation": settings["evaluation"]}
    return build_report(
        measured,
        run=RunFacts(
            settings=settings,
            clean_set=earlier.get("clean_set", {}),
            cost=earlier.get("cost", {}),
        ),
        agreement=agreement or None,
        mutual_information=earlier.get("mutual_information"),
        scan=earlier.get("scan"),
        figures=[*kept, *figures],
    )
