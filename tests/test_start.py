"""What ``start`` refuses: engines that cannot run, and an Accelerate that runs something else.

Wrong numbers of processes and devices: ``test_distributed.py``.
"""

import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from mimic_fast import engine_rules
from mimic_fast.config import OptimSettings, RunSettings
from mimic_fast.distributed import start
from mimic_fast.errors import UsageError

ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
CUT = ("fsdp2", "zero1", "zero2", "zero3")


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """It holds on to the first settings of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def launched(monkeypatch) -> None:
    """As torchrun leaves it; nothing here comes as far as to meet other processes."""
    monkeypatch.setenv("RANK", "0")


@pytest.fixture
def launched_alone(monkeypatch) -> Iterator[None]:
    """One process under torchrun, which goes on without a process group and what DeepSpeed sets."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    with warnings.catch_warnings():
        yield
    if dist.is_initialized():
        dist.destroy_process_group()


def refused(engine: str, *, precision: str = "fp32", deepspeed: Path | None = None) -> str:
    run = {"device": "cpu", "engine": engine, "deepspeed": deepspeed}
    optim = OptimSettings.model_validate({"precision": precision})
    with pytest.raises(UsageError) as error:
        start(RunSettings.model_validate(run), optim, expected_world=1)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("engine", CUT)
def test_engine_that_cuts_needs_a_launcher(monkeypatch, engine):
    monkeypatch.delenv("RANK", raising=False)
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

    message = refused(engine)

    assert message.startswith(f"run.engine '{engine}' cuts the student over processes")
    assert "torchrun --nproc-per-node=N -m mimic_fast" in message


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_zero_without_deepspeed_says_how_to_get_it(monkeypatch, launched, engine):
    find = engine_rules.find_spec
    monkeypatch.setattr(
        engine_rules, "find_spec", lambda name: None if name == "deepspeed" else find(name)
    )

    message = refused(engine)

    assert message == (
        f"run.engine '{engine}' needs the package deepspeed; pip install 'mimic_fast[deepspeed]'"
    )


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_zero_in_double_precision_is_refused(launched, engine):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

    message = refused(engine, precision="fp64")

    assert "keeps its weights in float32; use ddp or fsdp2 for fp64" in message


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_deepspeeds_file_beside_another_engine_is_refused(launched, tmp_path, engine):
    message = refused(engine, deepspeed=tmp_path / "zero.json")

    assert message.startswith(f"run.engine '{engine}' does not take run.deepspeed")
    assert message.endswith("leave it out")


@pytest.mark.parametrize("engine", CUT)
def test_engine_without_torch_distributed_is_refused(monkeypatch, launched, engine):
    monkeypatch.setattr(dist, "is_available", lambda: False)

    assert "needs torch.distributed, which this PyTorch lacks" in refused(engine)


def test_accelerate_that_was_started_otherwise_is_refused():
    Accelerator(cpu=True, mixed_precision="bf16")

    message = refused("ddp")

    assert message.startswith("run.engine 'ddp' on run.device 'cpu' cannot run: ")
    assert "mixed_precision" in message


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8"])
def test_precision_of_accelerates_environment_does_not_count(monkeypatch, precision):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)

    accelerator, _ = start(RunSettings(device="cpu"), OptimSettings(), expected_world=1)

    assert accelerator.mixed_precision == "no"


def test_deepspeeds_file_of_another_stage_is_refused(launched_alone, tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"zero_optimization": {"stage": 3}}')

    assert "is of ZeRO stage 3, run.engine asks for 2" in refused("zero2", deepspeed=path)
    assert not dist.is_initialized()


def test_engine_that_accelerate_leaves_out_is_refused(launched_alone, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # DeepSpeed is ignored on what is called a CPU

    assert refused("zero2") == (
        "engine zero2 was asked for but Accelerate runs MULTI_CPU; choose the engine in the recipe "
        "(run.engine), not in Accelerate's configuration"
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("USE_FSDP", "true"), ("USE_MEGATRON_LM", "true"), ("DYNAMO_BACKEND", "INDUCTOR")],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_accelerates_environment_decides_nothing(launched_alone, monkeypatch, engine, name, value):
    monkeypatch.setenv(f"ACCELERATE_{name}", value)

    message = refused(engine)

    assert message.startswith(f"ACCELERATE_{name}={value} makes Accelerate do what the recipe")
    assert message.endswith(f"unset ACCELERATE_{name}")
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("name", "value"), [("USE_FSDP", "false"), ("DYNAMO_BACKEND", "NO"), ("DYNAMO_BACKEND", "no")]
)
def test_accelerates_environment_that_asks_for_nothing_is_taken(monkeypatch, name, value):
    monkeypatch.setenv(f"ACCELERATE_{name}", value)

    accelerator, _ = start(RunSettings(device="cpu"), OptimSettings(), expected_world=1)

    assert accelerator.num_processes == 1


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_deepspeed_of_accelerates_environment_does_not_run(launched_alone, monkeypatch, engine):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # on a CPU it starts none of its own
    run = RunSettings.model_validate({"device": "cpu", "engine": engine})

    accelerator, _ = start(run, OptimSettings(), expected_world=1)

    assert accelerator.distributed_type.value == "MULTI_CPU"
