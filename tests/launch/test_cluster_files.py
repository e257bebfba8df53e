"""Launch files for Accelerate and DeepSpeed: their own readers take them, and real runs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mimic_fast.config import OptimSettings, RunSettings
from mimic_fast.deepspeed_config import deepspeed_config

LAUNCH = Path(__file__).parents[2] / "launch"
ACCELERATE = sorted((LAUNCH / "accelerate").glob("*.yaml"))
DEEPSPEED = sorted((LAUNCH / "deepspeed").glob("*.json"))


def ids(path: Path) -> str:
    return path.stem


def environment() -> dict[str, str]:
    """Without what another launcher would have set."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    return clean | {"OMP_NUM_THREADS": "1"}


def launched(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """``accelerate launch`` with these arguments."""
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *map(str, arguments)],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def test_there_is_a_file_for_every_case():
    assert [path.stem for path in ACCELERATE] == ["cpu", "gpu1", "gpu8", "multinode"]
    assert [path.stem for path in DEEPSPEED] == [
        *("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
    ]


@pytest.mark.parametrize("path", ACCELERATE, ids=ids)
def test_accelerate_reads_the_file_and_takes_no_engine_from_it(path):
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert not config.deepspeed_config
    assert not config.fsdp_config
    command = ["--config_file", str(path), "-m", "mimic_fast", "purify", "recipe.toml"]

    args, *_ = _validate_launch_command(launch_command_parser().parse_args(command))

    assert not any((args.use_deepspeed, args.use_fsdp, args.tpu))
    assert args.multi_gpu == (path.stem in ("gpu8", "multinode"))
    if args.multi_gpu:
        variables = prepare_multi_gpu_env(args)
        assert args.nproc_per_node == "8"
    else:
        words, variables = prepare_simple_launcher_cmd_env(args)
        assert words[1:] == ["-m", "mimic_fast", "purify", "recipe.toml"]
        assert variables["ACCELERATE_USE_CPU"] == str(path.stem == "cpu")
    assert variables["ACCELERATE_MIXED_PRECISION"] == "no"
    assert not {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & variables.keys()


def test_every_machine_of_several_is_told_its_place():
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import prepare_multi_gpu_env

    command = ["--config_file", str(LAUNCH / "accelerate" / "multinode.yaml")]
    place = ["--machine_rank", "1", "--main_process_ip", "10.0.0.7"]
    args, *_ = _validate_launch_command(
        launch_command_parser().parse_args([*command, *place, "-m", "mimic_fast"])
    )
    prepare_multi_gpu_env(args)

    assert (args.nnodes, args.node_rank, args.nproc_per_node) == ("2", 1, "8")
    assert (args.rdzv_backend, args.rdzv_endpoint) == ("static", "10.0.0.7:29500")


@pytest.mark.parametrize(
    ("name", "processes"), [pytest.param("cpu", 1, marks=pytest.mark.slow), ("gpu8", 2)]
)
def test_accelerate_launch_purifies(tmp_path, teacher, labeled, quick, name, processes):
    path = LAUNCH / "accelerate" / f"{name}.yaml"
    # port 0: a free one
    options = ("--num_processes", processes, "--main_process_port", 0) if processes > 1 else ()

    done = launched(
        *("--config_file", path, *options, "-m", "mimic_fast", "purify"),
        *("--teacher", teacher, "--data", labeled / "train", "--out", "run", *quick),
        *("--set", "run.max_steps=2"),
        folder=tmp_path,
    )

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "encoder.safetensors").is_file()
    assert f"{processes} process(es) on cpu" in done.stderr


def test_accelerate_launch_answers_1_for_a_mistake(tmp_path):
    path = LAUNCH / "accelerate" / "cpu.yaml"

    done = launched(
        *("--config_file", path, "-m", "mimic_fast", "purify", "nowhere.toml"), folder=tmp_path
    )

    assert "error: recipe nowhere.toml does not exist" in done.stderr
    assert done.returncode == 1


@pytest.mark.parametrize("path", DEEPSPEED, ids=ids)
def test_deepspeed_file_leaves_the_recipe_its_part(path):
    stage = int(path.stem[4])
    engine: Any = f"zero{stage}"

    config = deepspeed_config(
        RunSettings(engine=engine, deepspeed=path),
        OptimSettings(batch_size=64, accumulate=2, clip_norm=1.0),
        world=4,
    )

    own = json.loads(path.read_text())
    assert own.keys() == {
        "zero_optimization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
    }
    assert own.items() <= config.items()
    assert own["zero_optimization"]["stage"] == stage
    assert ("offload_optimizer" in own["zero_optimization"]) == path.stem.endswith("offload")
    assert config["train_micro_batch_size_per_gpu"] == 8


def test_deepspeed_itself_accepts_the_files():
    # a process of its own: the import is slow and warns
    code = """
import json, sys
from deepspeed.runtime import constants
from deepspeed.runtime.zero import config as zero
keys = {value for module in (constants, zero) for value in vars(module).values()
        if isinstance(value, str)} | {"zero_optimization"}
for name in sys.argv[1:]:
    own = json.load(open(name))
    assert own.keys() <= keys, own.keys() - keys
    part = own["zero_optimization"]
    known = {word for field, info in zero.DeepSpeedZeroConfig.model_fields.items()
             for word in (field, info.alias)}
    assert part.keys() <= known, part.keys() - known
    read = zero.DeepSpeedZeroConfig(**part).model_dump(by_alias=True, mode="json")
    for key, value in part.items():
        if isinstance(value, dict):
            assert value.items() <= read[key].items(), (name, key)
        else:
            assert read[key] == value, (name, key)
    print(name)
"""

    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, DEEPSPEED)],
        env=environment() | {"DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-len(DEEPSPEED) :] == [str(path) for path in DEEPSPEED]


@pytest.mark.slow
@pytest.mark.parametrize("path", DEEPSPEED, ids=ids)
def test_deepspeed_file_trains(path, torchrun, encoders, labeled, tmp_path, quick):
    arguments = (
        *("purify", "--teacher", encoders["vit"], "--data", labeled / "train"),
        *("--out", tmp_path / "run", *quick),
        *("--set", f"run.engine={path.stem[:5]}", "--set", f"run.deepspeed={path}"),
    )

    done = torchrun(["-m", "mimic_fast", *map(str, arguments)], timeout=200)

    assert done.returncode == 0, done.stdout[-4000:]
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(row)["loss"] for row in rows]
    assert losses[-1] < losses[0]
