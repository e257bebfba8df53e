"""``mimic-fast purify``: locate, distil, export, measure, report."""

import signal

import typer

from mimic_fast.launch.arguments import (
    AllowBudget,
    AttackFiles,
    CleanEncoder,
    Data,
    Device,
    Downstream,
    ForceOp,
    Json,
    Out,
    Overrides,
    Preset,
    Recipe,
    Resume,
    Seed,
    StudentOnly,
    Teacher,
    attack_values,
    downstream_values,
    given,
    launched_processes,
    print_json,
)


def purify(
    recipe: Recipe = None,
    teacher: Teacher = None,
    data: Data = None,
    out: Out = None,
    preset: Preset = None,
    seed: Seed = None,
    overrides: Overrides = None,
    resume: Resume = None,
    downstream: Downstream = None,
    attack: AttackFiles = None,
    allow_budget: AllowBudget = None,
    student_only: StudentOnly = None,
    clean: CleanEncoder = None,
    device: Device = None,
    force_op: ForceOp = None,
    as_json: Json = False,
) -> None:
    """Purify a suspect encoder with a few clean images; the result is a drop-in replacement.

    Under torchrun every process calls it. Ctrl-C, SIGTERM and SIGUSR1 save the state and leave with
    exit code 6; --resume auto goes on.
    """
    from mimic_fast.recipe import load_settings

    values = {
        **given(seed=seed),
        "encoder": given(teacher=teacher),
        "data": given(source=data, allow_budget=allow_budget),
        "run": given(out=out, resume=resume, device=device, force_op=force_op),
        "evaluation": given(
            downstream=downstream_values(downstream),
            attack=attack_values(attack),
            student_only=student_only,
            clean=clean,
        ),
    }
    settings = load_settings(recipe, preset=preset, overrides=overrides or (), values=values)

    # torch only now, so that a mistake in the settings shows at once
    from mimic_fast.distil import purify as run
    from mimic_fast.distributed import StopSignal
    from mimic_fast.evidence import write_evidence
    from mimic_fast.launch.memory import keep_freed_memory
    from mimic_fast.launch.progress import progress_bars
    from mimic_fast.launch.tables import print_report
    from mimic_fast.watch import process_0_alone, running_processes

    keep_freed_memory()
    # torchrun ends the other processes when one has left: that must not change their exit codes.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    with StopSignal() as signalled, progress_bars() as report:
        result = run(settings, world=launched_processes(), report=report, stop=signalled)
        content = process_0_alone(
            lambda stop: write_evidence(result, settings, report=report, stop=stop),
            processes=running_processes(),
            stop=signalled,
        )
    if content is None:
        return
    if as_json:
        print_json(content)
    else:
        print_report(content)
        typer.echo(f"purified encoder: {result.encoder}")
        typer.echo(f"report: {result.out / 'report.html'}")
