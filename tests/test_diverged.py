"""Dumps of diverged steps: whole and checked, or refused by the name of the file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mimic_fast.config import EncoderSpec, Settings
from mimic_fast.data.loader import Batch, Loader, TrainingImages
from mimic_fast.distributed import SINGLE, Processes
from mimic_fast.diverged import INDEX, STUDENT, dump_diverged, load_diverged
from mimic_fast.errors import MachineError, UnsafeInputError, UsageError

SPEC = EncoderSpec(
    architecture="timm:resnet18", image_size=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)
)
SETTINGS = Settings.model_validate(
    {"optim": {"batch_size": 8}, "loss": {"contrastive": 0.5, "teacher_view": "plain"}}
)
META: dict[str, Any] = {
    "settings": SETTINGS,
    "spec": SPEC,
    "taps": ("layer1", "layer4"),
    "layer_weights": (1000.0, 0.0),
    "teacher": "ab" * 32,
    "rows": [{"step": 4, "loss": 0.5}, {"step": 5, "loss": float("nan"), "skipped": True}],
}


def a_batch(processes: Processes = SINGLE) -> Batch:
    """The batch of step 5 of a run, this process's share of it."""
    generator = torch.Generator().manual_seed(0)
    squares = torch.randint(0, 256, (20, 3, 16, 16), generator=generator, dtype=torch.uint8)
    loader = Loader(
        TrainingImages(squares=squares), settings=SETTINGS, image_size=16, processes=processes
    )
    with loader.batches(4, 5) as batches:
        return next(iter(batches))


def a_student() -> dict[str, Tensor]:
    shared = torch.tensor([1.0, float("inf"), 3.0])
    return {
        "weight": shared,
        "alias": shared[:2],
        "count": torch.tensor(7),
        "t": torch.ones(2, 3).T,
    }


def dumped(folder: Path, batch: Batch | None = None, **changes: Any) -> Path:
    options: dict[str, Any] = {"step": 5, "rank": 0, "world": 1, "meta": META, **changes}
    options.setdefault("student", a_student())
    return dump_diverged(folder, batch=batch or a_batch(), **options)


def assert_same(found: Batch, expected: Batch) -> None:
    for name in ("v1", "v2", "ids", "plain", "student"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None), name
        assert one is None or torch.equal(one, other), name


def test_dump_comes_back_as_it_was(tmp_path):
    batch = a_batch()
    assert batch.v2 is not None
    assert batch.plain is not None

    folder = dumped(tmp_path / "run" / "diverged", batch)
    dump = load_diverged(folder)

    assert_same(dump.batch, batch)
    assert dump.student.keys() == a_student().keys()
    assert all(torch.equal(dump.student[name], value) for name, value in a_student().items())
    assert (dump.step, dump.world) == (5, 1)
    assert dump.facts.settings == SETTINGS
    assert dump.facts.spec == SPEC
    assert dump.facts.layer_weights == (1000.0, 0.0)
    assert dump.facts.rows[1] == {"step": 5, "loss": None, "skipped": True}
    assert dump.versions["torch"] == torch.__version__
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [INDEX, STUDENT, "rank_00000.safetensors"]
    )


def test_newer_dump_replaces_one_of_more_processes(tmp_path):
    dumped(tmp_path)
    (tmp_path / "rank_00001.safetensors").write_bytes(b"of an earlier run")

    dumped(tmp_path, step=9, batch=Batch(v1=torch.ones(2, 3, 4, 4), v2=None, ids=torch.arange(2)))

    dump = load_diverged(tmp_path)
    assert dump.step == 9
    assert dump.batch.v2 is None
    assert not (tmp_path / "rank_00001.safetensors").exists()


@pytest.mark.parametrize("name", [STUDENT, "rank_00000.safetensors", INDEX])
@pytest.mark.parametrize("place", [0.3, 0.9])
def test_damaged_file_is_refused_by_name(tmp_path, name, place):
    path = dumped(tmp_path) / name
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(bytes(data))

    with pytest.raises(UnsafeInputError, match=name) as caught:
        load_diverged(tmp_path)

    assert caught.value.exit_code == 4


@pytest.mark.parametrize("name", [STUDENT, "rank_00000.safetensors", INDEX])
def test_missing_file_is_named(tmp_path, name):
    (dumped(tmp_path) / name).unlink()

    with pytest.raises(UsageError, match=name):
        load_diverged(tmp_path)


def test_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match="nowhere"):
        load_diverged(tmp_path / "nowhere")


def test_altered_facts_are_refused(tmp_path):
    content = json.loads((dumped(tmp_path) / INDEX).read_text())
    content["facts"]["teacher"] = "cd" * 32
    (tmp_path / INDEX).write_text(json.dumps(content))

    with pytest.raises(UnsafeInputError, match=INDEX):
        load_diverged(tmp_path)


def test_place_that_cannot_be_written_is_the_machines_fault(tmp_path):
    (tmp_path / "file").write_text("no folder")

    with pytest.raises(MachineError, match="file"):
        dumped(tmp_path / "file" / "diverged")


def test_dump_without_a_student_is_our_mistake(tmp_path):
    with pytest.raises(ValueError, match="student"):
        dumped(tmp_path, student=None)

    assert not list(tmp_path.iterdir())


def test_killed_half_way_leaves_no_dump(tmp_path, monkeypatch):
    dumped(tmp_path)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mimic_fast.diverged.write_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        dumped(tmp_path, step=9)

    with pytest.raises(UsageError, match=INDEX):
        load_diverged(tmp_path)


def dump_share(folder: str) -> dict[str, str]:
    """One of two processes: dumps, then tries where only process 0 can write."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    batch = a_batch(Processes(rank=rank, world=2, device=torch.device("cpu")))
    student = a_student() if rank == 0 else None
    dumped(Path(folder) / "good", batch, student=student, rank=rank, world=2)
    barred = Path(folder) / "bad" if rank == 0 else Path(folder) / "file" / "bad"
    try:
        dumped(barred, batch, student=student, rank=rank, world=2)
    except MachineError as error:
        return {"error": str(error)}
    return {"error": ""}


def test_two_processes_dump_the_batch_of_one(run_processes, tmp_path):
    (tmp_path / "file").write_text("no folder")

    results = run_processes(dump_share, folder=str(tmp_path))

    dump = load_diverged(tmp_path / "good")
    assert dump.world == 2
    assert_same(dump.batch, a_batch())
    # Where one process fails, none goes on as if there were a dump.
    assert all("file" in result["error"] for result in results)
    with pytest.raises(UsageError):
        load_diverged(tmp_path / "bad")
