"""Teacher, data and packages as a run would take them in."""

from importlib.util import find_spec

import pytest
import torch
from PIL import Image

from mimic_fast.data.sources import CorruptItemError
from mimic_fast.doctor import hardware, inputs, probes, software
from mimic_fast.doctor.hardware import device, precision, usable_cores
from mimic_fast.errors import UsageError


def test_teacher_is_read_and_described(settings, teacher):
    finding, encoder = inputs.teacher(settings(f"encoder.teacher={teacher}"))

    assert finding.level == "ok"
    assert "timm:resnet18" in finding.seen
    assert "4 taps" in finding.seen
    assert encoder is not None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "none given"),
        (["encoder.teacher=gone.safetensors"], "does not exist"),
        (["encoder.taps=['layer9']"], "layer9"),
        (["encoder.architecture=timm:resnet50"], "resnet50"),
    ],
)
def test_teacher_that_a_run_would_refuse_fails(settings, teacher, overrides, message):
    given = [f"encoder.teacher={teacher}"] if "teacher" not in str(overrides) and overrides else []

    finding, encoder = inputs.teacher(settings(*given, *overrides))

    assert finding.level == "FAILED"
    assert message in finding.seen + finding.todo
    assert encoder is None


def test_damaged_teacher_fails(settings, teacher, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(teacher.read_bytes()[:-100])

    finding, _ = inputs.teacher(settings(f"encoder.teacher={tmp_path / 'bad.safetensors'}"))

    assert finding.level == "FAILED"


def test_video_is_not_opened_but_named(settings, tmp_path):
    pytest.importorskip("av")
    (tmp_path / "clips").mkdir()
    for name in ("a.mp4", "b.MOV"):
        (tmp_path / "clips" / name).write_bytes(b"no real video")
    for source in (tmp_path / "clips", tmp_path / "clips" / "a.mp4", tmp_path / "clips" / "*.mp4"):
        run = settings(f"data.source={source}")

        assert not inputs.data_opens_at_once(run)
        assert inputs.data(run, None).level == "warning"


@pytest.fixture
def pictures(tmp_path):
    for number in range(40):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / f"{number}.png")
    return tmp_path


WHOLE = ("data.clean_fraction=1", "data.allow_budget=true")


def test_data_is_opened_and_counted_as_a_run_would(settings, pictures):
    run = settings(f"data.source={pictures}", "optim.batch_size=8", *WHOLE)

    assert inputs.data_opens_at_once(run)
    assert "40 drawn, 36 of them train" in probes.data_opens(run.model_dump_json(), 2)


@pytest.mark.parametrize(
    ("overrides", "world", "message"),
    [
        (["data.clean_fraction=0.5"], 1, "over the budget"),
        ([*WHOLE, "optim.batch_size=37"], 1, "37 exceeds the 36"),
        ([*WHOLE, "optim.batch_size=9"], 2, "does not divide by 2"),
        (["data.clean_set=gone.json"], 1, "gone.json"),
    ],
)
def test_data_that_a_run_would_refuse_is_refused(settings, pictures, overrides, world, message):
    run = settings(f"data.source={pictures}", *overrides)

    with pytest.raises(UsageError, match=message):
        probes.data_opens(run.model_dump_json(), world)


def test_first_image_that_cannot_be_decoded_is_told(settings, tmp_path):
    (tmp_path / "0.png").write_bytes(b"no image")
    (tmp_path / "1.png").write_bytes(b"no image")

    with pytest.raises(CorruptItemError):
        probes.data_opens(settings(f"data.source={tmp_path}").model_dump_json(), 1)


def test_trackers_are_looked_at_only_if_asked_for(settings):
    assert inputs.tracker_packages(settings()) is None
    finding = inputs.tracker_packages(settings('run.trackers=["mlflow"]'))

    assert finding is not None
    there = all(find_spec(name) is not None for name in ("mlflow", "sqlalchemy", "alembic"))
    assert finding.level == ("ok" if there else "FAILED")
    assert there or "mlflow" in finding.seen


def test_dali_is_a_failure_only_where_it_is_needed():
    cpu = torch.device("cpu")

    assert inputs.dali(None, needed=True, device=cpu).level == "FAILED"
    assert inputs.dali(None, needed=False, device=cpu).level == "warning"


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_device_that_is_not_there_fails(settings):
    assert device(settings("run.device=cuda")).level == "FAILED"
    assert device(settings("run.device=auto")).level == "ok"
    assert "computes on cpu" in device(settings()).seen


def test_precision_without_instructions_for_it_warns(settings, monkeypatch):
    monkeypatch.setattr(hardware, "_narrow_instructions", lambda: False)
    cpu = "run.device=cpu"

    assert precision(settings(cpu)).level == "ok"
    assert precision(settings(cpu, "optim.precision=bf16")).level == "warning"
    assert "TF32" in precision(settings(cpu, "optim.tf32=true")).todo


def test_more_threads_than_cores_warn():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(usable_cores() + 1)
        finding = hardware.cpu()
    finally:
        torch.set_num_threads(before)

    assert finding.level == "warning"
    assert f"OMP_NUM_THREADS={usable_cores()}" in finding.todo
    assert hardware.cpu().level == "ok"


def test_packages_name_the_versions_that_run():
    finding = software.packages()

    assert finding.level == "ok"
    assert f"torch {torch.__version__.partition('+')[0]}" in finding.seen
