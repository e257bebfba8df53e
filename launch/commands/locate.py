"""``mimic-fast locate``: mutual information of every layer with the encoder's features (step A)."""

from mimic_fast.launch.arguments import (
    AllowBudget,
    Data,
    Device,
    ForceOp,
    Json,
    Out,
    Overrides,
    Preset,
    Recipe,
    Resume,
    Seed,
    Teacher,
    given,
    is_main_process,
    launched_processes,
    print_json,
)


def locate(
    recipe: Recipe = None,
    teacher: Teacher = None,
    data: Data = None,
    out: Out = None,
    preset: Preset = None,
    seed: Seed = None,
    overrides: Overrides = None,
    resume: Resume = None,
    allow_budget: AllowBudget = None,
    device: Device = None,
    force_op: ForceOp = None,
    as_json: Json = False,
) -> None:
    """Measure where the benign knowledge lies: mutual information per layer, with intervals."""
    from mimic_fast.recipe import load_settings

    values = {
        **given(seed=seed),
        "encoder": given(teacher=teacher),
        "data": given(source=data, allow_budget=allow_budget),
        "run": given(out=out, resume=resume, device=device, force_op=force_op),
    }
    settings = load_settings(recipe, preset=preset, overrides=overrides or (), values=values)

    # torch only now, so that a mistake in the settings shows at once
    from mimic_fast.distributed import StopSignal
    from mimic_fast.launch.memory import keep_freed_memory
    from mimic_fast.launch.progress import progress_bars
    from mimic_fast.launch.tables import print_information
    from mimic_fast.mutual_information.locate import locate as run
    from mimic_fast.mutual_information.locate import mutual_information_json

    keep_freed_memory()
    with progress_bars() as report, StopSignal() as stop:
        result = run(settings, report, world=launched_processes(), stop=stop)
    if not is_main_process():
        return
    if as_json:
        print_json(mutual_information_json(result))
    else:
        print_information(mutual_information_json(result))
