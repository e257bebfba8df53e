"""What every engine would do here: runs, needs something, or is refused, and why."""

import json
from typing import get_args

import pytest
import torch

from mimic_fast.config import Engine
from mimic_fast.doctor import engines, software
from mimic_fast.doctor.finding import Finding
from mimic_fast.doctor.paths import cpu_kernels, op_paths

ENGINES = get_args(Engine)
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")


def by_engine(settings) -> dict[str, Finding]:
    found = engines.engines(settings, world=1)
    return {finding.name.split()[1]: finding for finding in found}


@on_cpu
def test_every_engine_says_its_backend_and_launcher():
    pytest.importorskip("deepspeed")
    found = by_engine(None)

    assert tuple(found) == ENGINES
    assert all(finding.level == "ok" for finding in found.values())
    assert all("gloo" in finding.seen for finding in found.values())
    assert "one process directly" in found["ddp"].seen
    assert "Accelerate's own launcher runs one" in found["ddp"].seen
    assert all("under torchrun" in found[name].seen for name in ENGINES[1:])


def test_engine_that_cannot_run_fails_only_the_recipe_that_chose_it(settings):
    chosen = by_engine(settings("run.engine=zero2", "optim.precision=fp64"))
    other = by_engine(settings("run.engine=fsdp2", "optim.precision=fp64"))

    assert chosen["zero2"].level == "FAILED"
    assert chosen["zero2"].name == "engine zero2 (chosen)"
    assert "float32" in chosen["zero2"].seen
    assert "fsdp2" in chosen["zero2"].todo
    assert chosen["zero3"].level == "warning"
    assert other["zero2"].level == "warning"
    assert other["fsdp2"].level == "ok"


@on_cpu
def test_deepspeed_without_compiler_is_told_with_its_cure(settings, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("PATH", "")

    found = by_engine(settings("run.engine=zero1"))

    assert found["zero1"].level == "FAILED"
    assert "C++ compiler" in found["zero1"].seen
    assert "g++" in found["zero1"].todo
    assert found["ddp"].level == found["fsdp2"].level == "ok"
    assert software.compiler().level == "warning"


@pytest.mark.parametrize(
    ("engine", "content", "message"),
    [
        ("zero2", {"zero_optimization": {"stage": 3}}, "stage 3"),
        ("zero2", {"zero_optimization": {"stage": 2}, "fp16": {}}, "sets fp16"),
        ("zero2", None, "no JSON file"),
        ("ddp", {"zero_optimization": {"stage": 2}}, "for zero1"),
    ],
)
def test_deepspeed_file_that_does_not_fit_fails(settings, tmp_path, engine, content, message):
    path = tmp_path / "ds.json"
    path.write_text("{" if content is None else json.dumps(content))

    found = by_engine(settings(f"run.engine={engine}", f"run.deepspeed={path}"))

    assert found[engine].level == "FAILED"
    assert message in found[engine].seen


def test_deepspeed_file_that_fits_is_fine(settings, tmp_path):
    pytest.importorskip("deepspeed")
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))

    found = by_engine(settings("run.engine=zero3", f"run.deepspeed={tmp_path / 'ds.json'}"))

    assert found["zero3"].level == "ok"


@on_cpu
def test_ops_tell_the_path_they_take(settings):
    found = {finding.name: finding for finding in op_paths(None)}
    forced = op_paths(settings("run.force_op=reference"))
    (impossible,) = op_paths(settings("run.force_op=triton", "optim.precision=fp64"))

    built = cpu_kernels().level == "ok"
    assert set(found) == {"op distill", "op histogram", "op views"}
    for finding in found.values():
        assert ("run on cpp" in finding.seen) == built
        assert finding.level == ("ok" if built else "warning")
    assert "run on reference: forced" in forced[0].seen
    assert forced[0].level == "ok"
    assert impossible.level == "FAILED"
    assert "triton" in impossible.seen
    assert "cpp or reference" in impossible.todo
