"""What DeepSpeed is started with: the recipe decides, a user's file adds, clashes are refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from mimic_fast.config import OptimSettings, RunSettings
from mimic_fast.deepspeed_config import deepspeed_config, zero_stage
from mimic_fast.errors import UsageError

FILES = sorted((Path(__file__).parents[1] / "launch" / "deepspeed").glob("*.json"))
TAKEN: dict[str, Any] = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "fp16": {"enabled": True},
    "bf16": {"enabled": True},
    "torch_autocast": {"enabled": True},
    "amp": {"enabled": True},
    "optimizer": {"type": "Adam"},
    "scheduler": {"type": "WarmupLR"},
}


def config(
    engine: str, file: Path | None = None, *, world: int = 2, **optim: Any
) -> dict[str, Any]:
    run = RunSettings.model_validate({"engine": engine, "deepspeed": file})
    return deepspeed_config(run, OptimSettings.model_validate(optim), world=world)


@pytest.fixture
def write(tmp_path):
    def write(content: object) -> Path:
        path = tmp_path / "user.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


@pytest.mark.parametrize(
    ("engine", "stage"), [("zero1", 1), ("zero2", 2), ("zero3", 3), ("ddp", 0), ("fsdp2", 0)]
)
def test_stage_is_that_of_the_engine(engine, stage):
    assert zero_stage(engine) == stage
    if stage:
        assert config(engine)["zero_optimization"]["stage"] == stage


@pytest.mark.parametrize(
    ("batch", "accumulate", "world", "expected"),
    [(128, 1, 1, (128, 128, 1)), (128, 1, 4, (128, 32, 1)), (96, 3, 4, (96, 8, 3))],
)
def test_batch_and_clipping_are_those_of_the_recipe(batch, accumulate, world, expected):
    found = config("zero2", world=world, batch_size=batch, accumulate=accumulate, clip_norm=2.5)

    assert (
        found["train_batch_size"],
        found["train_micro_batch_size_per_gpu"],
        found["gradient_accumulation_steps"],
    ) == expected
    assert found["gradient_clipping"] == 2.5


def test_precision_stays_single_whatever_the_recipe_says():
    for precision in ("fp32", "bf16", "fp16"):
        assert (
            not {"fp16", "bf16", "torch_autocast", "amp"}
            & config("zero1", precision=precision).keys()
        )


def test_only_stage_3_has_settings_of_its_own():
    stages = [config(f"zero{stage}")["zero_optimization"] for stage in (1, 2, 3)]

    own = [name for zero in stages for name in zero if name.startswith("stage3_")]
    assert own == ["stage3_gather_16bit_weights_on_model_save"]
    assert stages[2][own[0]] is False


def test_settings_of_a_users_file_are_kept(write):
    zero = {"stage": 2, "reduce_bucket_size": 7, "offload_optimizer": {"device": "cpu"}}
    path = write({"zero_optimization": zero, "wall_clock_breakdown": True})

    found = config("zero2", path, batch_size=64)

    assert found["zero_optimization"] == zero
    assert found["wall_clock_breakdown"] is True
    assert found["train_batch_size"] == 64
    # Without them DeepSpeed refuses our optimizer, or puts its own in place of it.
    assert found["zero_allow_untested_optimizer"] is True
    assert found["zero_force_ds_cpu_optimizer"] is False


def test_a_users_file_may_choose_deepspeeds_own_cpu_optimizer(write):
    path = write({"zero_optimization": {"stage": 1}, "zero_force_ds_cpu_optimizer": True})

    assert config("zero1", path)["zero_force_ds_cpu_optimizer"] is True


def test_deepspeed_never_prints_in_between(write):
    path = write({"zero_optimization": {"stage": 1}, "steps_per_print": 1})

    assert config("zero1", path)["steps_per_print"] >= 10**9


@pytest.mark.parametrize("name", TAKEN)
def test_what_the_recipe_decides_is_refused_by_name(write, name):
    path = write({"zero_optimization": {"stage": 3}, name: TAKEN[name]})

    with pytest.raises(UsageError, match=rf"user\.json sets {name}, which the recipe decides"):
        config("zero3", path)


def test_all_that_is_refused_is_named_at_once(write):
    path = write({"zero_optimization": {"stage": 3}, **TAKEN})

    with pytest.raises(UsageError) as refused:
        config("zero3", path)

    assert all(name in str(refused.value) for name in TAKEN)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "stage"),
    [
        ({"zero_optimization": {"stage": 2}}, "2"),
        ({"zero_optimization": {"stage": 0}}, "0"),
        ({"zero_optimization": {}}, "None"),
        ({"zero_optimization": 3}, "None"),
        ({}, "None"),
        ([], "None"),
        ("null", "None"),
    ],
)
def test_file_of_another_stage_is_refused(write, content, stage):
    with pytest.raises(UsageError, match=rf"is of ZeRO stage {stage}, run\.engine asks for 3; set"):
        config("zero3", write(content))


@pytest.mark.parametrize("content", ["", "{", "stage = 3", "\ufffe"])
def test_file_that_is_no_json_is_refused(write, content):
    with pytest.raises(UsageError, match=r"run\.deepspeed .*user\.json is no JSON file") as refused:
        config("zero3", write(content))
    assert "\n" not in str(refused.value)


def test_file_that_cannot_be_read_is_refused(tmp_path):
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(UsageError, match=rf"run\.deepspeed {path} is no JSON file"):
            config("zero3", path)
    (tmp_path / "latin.json").write_bytes(b'{"\xe9": 1}')
    with pytest.raises(UsageError, match="is no JSON file"):
        config("zero3", tmp_path / "latin.json")


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_files_that_come_along_are_taken(file):
    engine = file.stem[:5]
    content = json.loads(file.read_text())

    found = config(engine, file)

    assert found.items() >= content.items()
    others = {"zero1", "zero2", "zero3"} - {engine}
    for other in others:
        with pytest.raises(UsageError, match=f"asks for {other[-1]}"):
            config(other, file)


def test_every_stage_comes_along_and_two_offload():
    assert [path.stem for path in FILES] == [
        "zero1",
        "zero2",
        "zero2_offload",
        "zero3",
        "zero3_offload",
    ]


@pytest.mark.parametrize("file", [None, *FILES], ids=lambda path: path.stem if path else "built-in")
def test_deepspeed_itself_takes_them(file):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = config(file.stem[:5] if file else "zero3", file)["zero_optimization"]

    taken = DeepSpeedZeroConfig(**zero)  # it refuses names that it does not know

    assert taken.stage == zero["stage"]
