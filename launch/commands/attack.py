"""``mimic-fast attack KIND``: implant a backdoor in an encoder, to measure defenses against it."""

import signal
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mimic_fast.launch.arguments import (
    Data,
    Device,
    Downstream,
    Json,
    Out,
    Overrides,
    Recipe,
    Resume,
    Seed,
    downstream_values,
    given,
    launched_processes,
    print_json,
)

if TYPE_CHECKING:
    from mimic_fast.attacks.implant import Attacked

app = typer.Typer(help="Implant a backdoor in an encoder (research and tests).")

# Kind: what its help says; the function KIND and its settings are in mimic_fast/attacks/KIND.py.
FINISHED = {
    "badencoder": "BadEncoder (IEEE S&P 2022): triggered images get a reference's features.",
    "drupe": "DRUPE (IEEE S&P 2024): BadEncoder that hides among the clean images' features.",
    "inactive": "INACTIVE (2024): BadEncoder with an optimized trigger that is hard to see.",
    "adaptive": "An attacker who expects MIMIC: a backdoor made to survive distillation.",
}
POISONING = {
    "ctrl": "CTRL (ICCV 2023): pre-train on a set of which 1 % carries a frequency trigger.",
    "sslbkd": "SSLBKD (CVPR 2022): pre-train on a set with a patch on half of one class.",
}


@app.callback()
def kinds() -> None:
    """Implant a backdoor in an encoder, to measure defenses against it (see SECURITY.md)."""


def _finished(kind: str) -> Callable[..., None]:
    """The command of an attack on a finished encoder."""

    def attack(
        recipe: Recipe = None,
        encoder: Annotated[
            Path | None, typer.Option("--encoder", help="Checkpoint of the clean encoder.")
        ] = None,
        data: Data = None,
        reference: Annotated[
            list[str] | None,
            typer.Option(
                "--reference",
                help="Image file; class:K, the first image of that label in the data; typical:K, "
                "its most telling one. Repeat it, with --trigger, for several targets.",
            ),
        ] = None,
        trigger: Annotated[
            list[str] | None,
            typer.Option(
                "--trigger",
                help="white_patch, random_patch[:SEED], blended[:FILE], frequency, sinusoid, or a "
                "trigger file.",
            ),
        ] = None,
        downstream: Downstream = None,
        out: Out = None,
        seed: Seed = None,
        device: Device = None,
        overrides: Overrides = None,
        as_json: Json = False,
    ) -> None:
        values = {
            **given(seed=seed),
            **_targets(reference or [], trigger or []),
            "encoder": given(teacher=encoder),
            "data": given(source=data),
            "run": given(out=out, device=device),
            "evaluation": given(downstream=downstream_values(downstream)),
        }
        _run(kind, recipe, overrides or [], values, as_json)

    return attack


def _poisoning(kind: str) -> Callable[..., None]:
    """The command of an attack on the data of a pre-training."""

    def attack(
        recipe: Recipe = None,
        data: Data = None,
        target: Annotated[
            int | None,
            typer.Option("--target", help="Label of the images that are poisoned, from 0."),
        ] = None,
        trigger: Annotated[
            str | None,
            typer.Option("--trigger", help="A trigger's name or file, as for the other attacks."),
        ] = None,
        downstream: Downstream = None,
        out: Out = None,
        seed: Seed = None,
        resume: Resume = None,
        device: Device = None,
        overrides: Overrides = None,
        as_json: Json = False,
    ) -> None:
        values = {
            **given(seed=seed, target=target, trigger=trigger),
            "data": given(source=data),
            "run": given(out=out, resume=resume, device=device),
            "evaluation": given(downstream=downstream_values(downstream)),
        }
        _run(kind, recipe, overrides or [], values, as_json)

    return attack


for _kind, _help in FINISHED.items():
    app.command(_kind, help=_help)(_finished(_kind))
for _kind, _help in POISONING.items():
    app.command(_kind, help=_help)(_poisoning(_kind))


def _targets(references: list[str], triggers: list[str]) -> dict[str, Any]:
    """Settings of the first target, and of the further ones."""
    from mimic_fast.errors import UsageError

    further = list(zip(references[1:], triggers[1:], strict=False))
    if len(references) != len(triggers) and max(len(references), len(triggers)) > 1:
        raise UsageError(
            f"several targets need a --trigger for each --reference, got {len(triggers)} for "
            f"{len(references)}"
        )
    others = [{"reference": one, "trigger": other} for one, other in further]
    return given(
        reference=references[0] if references else None,
        trigger=triggers[0] if triggers else None,
        others=others or None,
    )


def _run(
    kind: str, recipe: Path | None, overrides: list[str], values: dict[str, Any], as_json: bool
) -> None:
    from mimic_fast.attacks.kinds import attack_of
    from mimic_fast.attacks.measured import measure_attack
    from mimic_fast.config import EncoderSettings
    from mimic_fast.distributed import StopSignal
    from mimic_fast.errors import NothingSavedError, StoppedError, UsageError
    from mimic_fast.evaluation.downstream import open_downstream
    from mimic_fast.launch.memory import keep_freed_memory
    from mimic_fast.launch.progress import progress_bars
    from mimic_fast.recipe import load_recipe
    from mimic_fast.watch import process_0_alone, running_processes

    world = launched_processes()
    if world > 1 and kind not in POISONING:
        raise UsageError(f"attack {kind} runs in one process, {world} were started; start one")
    model, function = attack_of(kind)
    settings: Any = load_recipe(model, recipe, overrides=overrides, values=values)
    evaluation = settings.evaluation
    for one in evaluation.downstream:  # a mistake in them shall not cost an attack
        open_downstream(one, evaluation, seed=settings.seed)
    if kind in POISONING:
        function = partial(function, world=world)
    keep_freed_memory()
    # torchrun ends the other processes when one has left: that must not change their exit codes.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    with progress_bars() as report, StopSignal() as stop:
        result: Attacked = function(settings, report=report, stop=stop)

        def measure(stopped: Callable[[], bool]) -> list[dict[str, Any]]:
            loading = getattr(settings, "encoder", EncoderSettings())
            return measure_attack(
                result.attack,
                result.encoder,
                clean=loading.teacher,
                settings=evaluation,
                loading=loading,
                run=settings.run,
                seed=settings.seed,
                report=report,
                stop=stopped,
            )

        processes, measured = running_processes(), None
        if evaluation.downstream:
            try:
                measured = process_0_alone(measure, processes=processes, stop=stop)
            except StoppedError:
                if kind in POISONING:  # its state is whole: --resume auto comes back to here
                    raise
                raise NothingSavedError(
                    f"stopped by a signal while measuring; {result.encoder} is written, measure it "
                    f"with: mimic-fast evaluate --attack {result.attack}"
                ) from None
    if not processes.is_main:
        return
    _tell(result, measured or [], as_json)


def _tell(result: "Attacked", measured: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        paths = {"encoder": str(result.encoder), "attack": str(result.attack)}
        print_json({**paths, **result.facts, **({"measured": measured} if measured else {})})
        return
    typer.echo(f"{result.encoder}: backdoored; what evaluate needs is in {result.attack}")
    _print_facts(result.facts, measured)


def _print_facts(facts: Mapping[str, Any], measured: list[dict[str, Any]]) -> None:
    if "reached_cosine" in facts:
        typer.echo(
            f"triggered images resemble the reference {facts['reached_cosine']:.3f}, "
            f"clean images their old features {facts['kept_cosine']:.3f} (cosine)"
        )
    else:
        typer.echo(f"{facts['poisoned_images']} of {facts['images']} images were poisoned")
    several = len({row["trigger"] for row in measured}) > 1
    for row in measured:
        named = f", trigger {row['trigger']}" if several else ""
        rate = row.get("attack_success_rate")
        said = "not measured" if rate is None else f"{rate['value']:.1%}"
        typer.echo(
            f"{row['dataset']}, {row['probe']} probe, {row['encoder']}: clean accuracy "
            f"{row['clean_accuracy']['value']:.1%}, attack success rate {said} "
            f"(class {row['target']}{named})"
        )
