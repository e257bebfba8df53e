"""Real runs, read back with each tracker's own reader."""

import json
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from mimic_fast import trackers
from mimic_fast.config import Settings
from mimic_fast.errors import UsageError
from mimic_fast.recipe import load_settings

for package in ("tensorboard", "wandb", "mlflow", "sqlalchemy", "alembic"):
    pytest.importorskip(package, reason="needs the packages of mimic_fast[trackers]")

# Of SQLAlchemy, to MLflow.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")

ALL = ("tensorboard", "wandb", "mlflow")


def settings() -> Settings:
    return load_settings(
        overrides=("optim.lr=0.25", "run.trackers=['mlflow']"),
        values={"encoder": {"teacher": "/secret/place/teacher.safetensors"}},
    )


def row(step: int) -> dict[str, Any]:
    """As training writes them."""
    return {
        "step": step,
        "loss": 1.0 / step,
        "skipped": step == 2,
        "ids": [1, 2],
        "grad_norm": float("nan"),
        "time": {"data": 0.5 * step},
        "performance": {"scaling": {"efficiency": None}, "ranks": {"step_p50_ms": [1.0, 2.0]}},
    }


def run(out: Path, names: tuple[str, ...], steps: range, *, resume: bool = False) -> None:
    accelerator = Accelerator(cpu=True)
    trackers.start_trackers(
        accelerator, names, out=out, settings=settings(), resume=resume, step=steps[0] - 1
    )
    for step in steps:
        trackers.log(accelerator, row(step), step)
    trackers.finish(accelerator)


def scalars(out: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard")).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def wandb_records(folder: Path) -> Iterator[Any]:
    """W&B's log: seven bytes, then blocks of 32 KiB; a record may be cut into fragments."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    (path,) = folder.glob("*.wandb")
    content, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<4xHB", content, at)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last fragment
            yield Record.FromString(whole)
            whole = b""


def wandb_history(folder: Path) -> list[dict[str, Any]]:
    """Rows of a finished run; W&B's own process may still be writing when ``finish`` returns."""
    end = time.monotonic() + 20
    while True:
        records = list(wandb_records(folder))
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            break
        assert time.monotonic() < end, "the run was never closed"
        time.sleep(0.02)
    return [
        {
            "/".join(item.nested_key) or item.key: json.loads(item.value_json)
            for item in record.history.item
        }
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]


def mlflow_runs(out: Path) -> list[Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{out / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("mimic_fast")
    assert experiment is not None
    return [
        (
            found,
            {
                name: client.get_metric_history(found.info.run_id, name)
                for name in found.data.metrics
            },
        )
        for found in client.search_runs([experiment.experiment_id])
    ]


def test_tensorboard_holds_every_number_of_every_row(tmp_path):
    run(tmp_path, ("tensorboard",), range(1, 4))

    found = scalars(tmp_path)

    assert set(found) == {"loss", "skipped", "time/data"}
    assert found["time/data"] == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert found["skipped"] == [(1, 0.0), (2, 1.0), (3, 0.0)]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1  # one run, without a second one


def test_tensorboard_hides_what_a_killed_run_did_after_the_state_it_resumes(tmp_path):
    run(tmp_path, ("tensorboard",), range(1, 6))
    run(tmp_path, ("tensorboard",), range(4, 8), resume=True)

    assert [step for step, _ in scalars(tmp_path)["loss"]] == [1, 2, 3, 4, 5, 6, 7]


def test_wandb_is_offline_in_the_run_directory_and_resumes_its_run(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run(tmp_path, ("wandb",), range(1, 4))
    run(tmp_path, ("wandb",), range(3, 5), resume=True)

    first, second = sorted((tmp_path / "wandb").glob("offline-run-*"))
    name = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    assert {path.name for path in (*first.glob("*.wandb"), *second.glob("*.wandb"))} == {
        f"run-{name}.wandb"
    }
    history = wandb_history(first)
    assert [entry["loss"] for entry in history] == [1.0, 0.5, pytest.approx(1 / 3)]
    assert [entry["_step"] for entry in wandb_history(second)] == [3, 4]


def test_mlflow_writes_a_database_and_resumes_its_run(tmp_path):
    import mlflow

    run(tmp_path, ("mlflow",), range(1, 4))
    run(tmp_path, ("mlflow",), range(4, 6), resume=True)

    ((found, history),) = mlflow_runs(tmp_path)
    assert [(m.step, m.value) for m in history["time/data"]] == [(n, 0.5 * n) for n in range(1, 6)]
    assert found.data.params["optim.lr"] == "0.25"
    assert found.info.status == "FINISHED"
    assert not mlflow.is_tracking_uri_set()  # the next run has its own


def test_no_tracker_is_told_a_folder_or_a_secret_of_this_machine(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN"):
        monkeypatch.setenv(name, "5ec4e7" * 7)

    run(tmp_path, ALL, range(1, 2))

    inside = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(inside) > 4
    for secret in (b"/secret/place", b"5ec4e7" * 7):
        assert not [path for path in inside if secret in path.read_bytes()]
    ((found, _),) = mlflow_runs(tmp_path)
    assert found.data.params["encoder.teacher"] == "teacher.safetensors"
    assert found.data.tags["mlflow.source.name"] == "mimic_fast"  # not the command's path


def test_a_new_run_does_not_go_on_with_an_old_one(tmp_path):
    run(tmp_path, ("mlflow",), range(1, 2))
    run(tmp_path, ("mlflow",), range(1, 2))

    assert len(mlflow_runs(tmp_path)) == 2


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)

    with pytest.raises(UsageError, match=r"'wandb'.*mimic_fast\[trackers\]"):
        run(tmp_path, ("tensorboard", "wandb"), range(1, 2))
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_does_not_start_is_named(tmp_path):
    (tmp_path / "tensorboard").write_text("in the way")

    with pytest.raises(UsageError, match="'tensorboard', which cannot start"):
        run(tmp_path, ("tensorboard",), range(1, 2))


def test_a_damaged_database_is_named_and_what_had_started_is_closed(tmp_path):
    import mlflow

    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "mlflow.db").write_text("not a database" * 100)
    accelerator = Accelerator(cpu=True)

    with pytest.raises(UsageError, match="'mlflow', which cannot start: ") as caught:
        trackers.start_trackers(
            accelerator, ("tensorboard", "mlflow"), out=tmp_path, settings=settings(), resume=False
        )

    assert "not a database" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not accelerator.trackers
    assert not mlflow.is_tracking_uri_set()


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(tmp_path, monkeypatch):
    accelerator = Accelerator(cpu=True)
    trackers.start_trackers(
        accelerator, ("tensorboard", "mlflow"), out=tmp_path, settings=settings(), resume=False
    )
    monkeypatch.setattr(
        accelerator.get_tracker("mlflow"),
        "log",
        lambda values, step: (_ for _ in ()).throw(OSError("full")),
    )

    with pytest.warns(UserWarning, match="mlflow failed at step 1 .*full"):
        trackers.log(accelerator, row(1), 1)
    trackers.log(accelerator, row(2), 2)
    trackers.finish(accelerator)

    assert [step for step, _ in scalars(tmp_path)["loss"]] == [1, 2]


def test_without_trackers_nothing_is_written(tmp_path):
    run(tmp_path, (), range(1, 3))

    assert not list(tmp_path.iterdir())


def two(out: str) -> list[str]:
    """All trackers on two real processes; what was open on this one."""
    torch.distributed.init_process_group("gloo")
    accelerator = Accelerator(cpu=True)
    trackers.start_trackers(
        accelerator, ALL, out=Path(out), settings=settings(), resume=False, step=0
    )
    for step in (1, 2):
        trackers.log(accelerator, row(step), step)
    names = [str(tracker.name) for tracker in accelerator.trackers]
    trackers.finish(accelerator)
    return names


def test_two_processes_have_one_run_of_each(tmp_path, run_processes):
    opened = run_processes(two, out=str(tmp_path))

    assert opened == [list(ALL), []]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert [entry["_step"] for entry in wandb_history(folder)] == [1, 2]
    ((_, history),) = mlflow_runs(tmp_path)
    assert [m.step for m in history["loss"]] == [1, 2]
