"""The set that the scan is measured on: enough encoders of enough kinds, by commands that exist."""

from itertools import pairwise
from pathlib import Path

from benchmarks.make_scan_set import ATTACKS, SEEDS, commands
from mimic_fast.attacks.kinds import attack_of
from mimic_fast.evaluation.triggers import named_trigger
from mimic_fast.pretraining import PretrainSettings
from mimic_fast.recipe import load_recipe


def settings_of(command: list[str]) -> list[str]:
    return [value for flag, value in pairwise(command) if flag == "--set"]


def test_set_has_twenty_of_each_and_no_folder_twice():
    made = list(commands(Path("cifar10"), Path("set")))

    assert len(SEEDS) == 20
    assert len(ATTACKS) >= 20
    assert len({folder for folder, _, _ in made}) == len(made) == len(SEEDS) + len(ATTACKS)


def test_every_setting_and_trigger_is_known():
    for _, _, command in commands(Path("cifar10"), Path("set")):
        if command[0] == "pretrain":
            load_recipe(PretrainSettings, Path(command[1]), overrides=settings_of(command))
            continue
        model, _ = attack_of(command[1])
        load_recipe(model, overrides=settings_of(command))
        if "--trigger" in command:
            trigger = command[command.index("--trigger") + 1]
            assert named_trigger(trigger, image_size=32, channels=3).name == trigger
