"""What is cut over processes: read by any number of them, whole or not at all, and nobody hangs."""

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mimic_fast.checkpoint import State, load_state, newest_state, save_state
from mimic_fast.distributed import SINGLE, Processes
from mimic_fast.engines.flat_piece import FlatPiece
from mimic_fast.errors import MachineError, UnsafeInputError, UsageError
from mimic_fast.sharded_state import newest_for_all, read_pieces, write_pieces

# Of every tensor, where each process's range ends; process 1 holds nothing of the last.
CUTS: dict[str, Sequence[int]] = {"weights/a": (400, 1000), "weights/b.c": (3, 7), "short": (1, 1)}


def values(name: str, step: int = 1) -> Tensor:
    total = CUTS[name][-1]
    numbers = torch.randn(total, generator=torch.Generator().manual_seed(total)) * step
    return numbers.bfloat16() if name == "weights/b.c" else numbers


def pieces(rank: int, world: int, step: int = 1) -> dict[str, FlatPiece]:
    """Ranges of a process, or everything."""
    found: dict[str, FlatPiece] = {}
    for name, ends in CUTS.items():
        first = 0 if rank == 0 else ends[0]
        last = ends[rank] if world == 2 else ends[-1]
        if last > first:
            held = values(name, step)[first:last].clone()
            found[name] = FlatPiece(held, offset=first, total=ends[-1])
    return found


def read(folder: Path, rank: int, world: int) -> dict[str, Tensor]:
    found = pieces(rank, world)
    for piece in found.values():
        piece.values.zero_()
    read_pieces(folder, found)
    return {name: piece.values for name, piece in found.items()}


def expected(rank: int, world: int) -> dict[str, Tensor]:
    return {name: piece.values for name, piece in pieces(rank, world).items()}


def saved(root: Path, step: int) -> Path:
    """A state of this process alone."""

    def write(folder: Path) -> None:
        write_pieces(folder, pieces(0, 1, step), group=dist.group.WORLD)

    tensors: Mapping[str, Mapping[str, Tensor]] = {"buffers": {"n": torch.tensor(step)}}
    return save_state(root, step, tensors=tensors, meta={"n": step}, keep=9, write=write)


def flip(path: Path) -> None:
    """One bit in the middle: the values' lie behind a header."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.fixture
def group(tmp_path):
    """A process group of one: without any, torch warns of it."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# Two processes.


def said(call: Callable[[], object]) -> str:
    try:
        call()
    except (MachineError, UnsafeInputError, UsageError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def newest(root: Path, processes: Processes) -> dict[str, Any]:
    """What all take, and who warned of what."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = newest_for_all(root, processes)
    assert state is not None
    assert state.sharded is not None
    return {
        "step": state.step,
        "groups": sorted(state.tensors),
        "meta": dict(state.meta),
        "read": read(state.sharded, processes.rank, processes.world),
        "warned": [str(warning.message) for warning in caught],
    }


def refused(root: Path, processes: Processes) -> dict[str, str]:
    """What each process is told where nothing can be written or read."""
    main = processes.is_main
    own, blocked = pieces(processes.rank, processes.world), root / "blocked"
    if main:
        blocked.write_text("a file where the folder should be")
        (root / "unseen").mkdir()
        for name in ("unseen", "garbled"):
            shutil.copytree(root / "one" / "step_0000001", root / name / "step_0000001")
        (root / "garbled" / "step_0000001" / "state.json").write_text("{}")
    dist.barrier()

    def give_up() -> None:
        write_pieces(None, own, group=dist.group.WORLD, given_up=main)

    def write_nowhere() -> None:
        write_pieces(blocked if main else None, own, group=dist.group.WORLD)

    def look_elsewhere() -> None:
        newest_for_all(root / ("unseen" if main else "elsewhere"), processes)

    def read_other_bytes() -> None:  # as through a file system that is not the same for all
        newest_for_all(root / ("unseen" if main else "garbled"), processes)

    return {
        "given up": said(give_up),
        "blocked": said(write_nowhere),
        "unseen": said(look_elsewhere),
        "garbled": said(read_other_bytes),
    }


def worker(root: str) -> dict[str, Any]:
    dist.init_process_group("gloo")
    processes = Processes(rank=dist.get_rank(), world=2, device=torch.device("cpu"))
    rank, folder = processes.rank, Path(root) / "two"
    write_pieces(
        folder if rank == 0 else None, pieces(rank, processes.world), group=dist.group.WORLD
    )
    return {
        "of one": read(Path(root) / "one" / "step_0000001" / "sharded", rank, 2),
        "of two": read(folder, rank, 2),
        "newest": {name: newest(Path(root) / name, processes) for name in ("one", "damaged")},
        "none": newest_for_all(Path(root) / "absent", processes) is None,
        "refused": refused(Path(root), processes),
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def two_processes(run_processes, root) -> list[dict[str, Any]]:
    dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=0, world_size=1)
    try:
        for name in ("one", "damaged"):
            saved(root / name, 1)
        flip(saved(root / "damaged", 2) / "sharded" / "__0_0.distcp")
    finally:
        dist.destroy_process_group()
    return run_processes(worker, world=2, root=str(root))


def test_two_processes_read_what_one_wrote(two_processes):
    for rank, result in enumerate(two_processes):
        torch.testing.assert_close(result["of one"], expected(rank, 2), rtol=0, atol=0)


def test_two_processes_read_what_two_wrote(two_processes):
    for rank, result in enumerate(two_processes):
        torch.testing.assert_close(result["of two"], expected(rank, 2), rtol=0, atol=0)


def test_one_process_reads_what_two_wrote(two_processes, root, group):
    names = sorted(path.name for path in (root / "two").iterdir())
    assert names == [".metadata", "__0_0.distcp", "__1_0.distcp"]

    torch.testing.assert_close(read(root / "two", 0, 1), expected(0, 1), rtol=0, atol=0)


def test_all_processes_take_the_newest_state(two_processes):
    for rank, result in enumerate(two_processes):
        found = result["newest"]["one"]
        assert (found["step"], found["groups"], found["meta"]) == (1, ["buffers"], {"n": 1})
        assert found["warned"] == []
        torch.testing.assert_close(found["read"], expected(rank, 2), rtol=0, atol=0)
        assert result["none"]


def test_all_processes_take_the_state_before_a_damaged_one(two_processes):
    for rank, result in enumerate(two_processes):
        found = result["newest"]["damaged"]
        assert (found["step"], found["meta"]) == (1, {"n": 1})
        torch.testing.assert_close(found["read"], expected(rank, 2), rtol=0, atol=0)
    (warning,) = two_processes[0]["newest"]["damaged"]["warned"]
    assert "step_0000002/sharded/__0_0.distcp is damaged" in warning
    assert "trying the state before it" in warning
    assert two_processes[1]["newest"]["damaged"]["warned"] == []  # once is enough


def test_nobody_waits_for_a_process_0_that_gives_up(two_processes):
    told = [result["refused"]["given up"] for result in two_processes]

    assert told == ["", "MachineError: process 0 could not begin to write the run state"]


def test_folder_that_cannot_be_written_is_a_machine_error_of_all(two_processes, root):
    for result in two_processes:
        message = result["refused"]["blocked"]
        assert message.startswith(f"MachineError: cannot write {root / 'blocked'}: ")
        assert "\n" not in message


def test_folder_that_not_all_see_is_refused_by_all(two_processes):
    for result in two_processes:
        message = result["refused"]["unseen"]
        assert message.startswith("UsageError: not all processes see the state step_0000001")
        assert "--out must be one folder that all of them see" in message


def test_state_that_one_process_cannot_read_is_refused_by_all(two_processes, root):
    main, other = [result["refused"]["garbled"] for result in two_processes]

    assert main.startswith("UnsafeInputError: another process cannot read the state")
    assert "state.json" in other
    assert other.startswith("UnsafeInputError: run state")


# One process.


def taken_by(kind: str, root: Path) -> State | None:
    return newest_for_all(root, SINGLE) if kind == "newest_for_all" else newest_state(root)


@pytest.mark.parametrize("kind", ["newest_for_all", "newest_state"])
@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata"])
def test_damaged_state_is_refused_by_name_and_the_one_before_is_taken(
    group, tmp_path, file, damage, kind
):
    saved(tmp_path, 1)
    damage(saved(tmp_path, 2) / "sharded" / file)

    with pytest.warns(RuntimeWarning, match=f"step_0000002/sharded/{file}.*the state before it"):
        state = taken_by(kind, tmp_path)

    assert state is not None
    assert state.step == 1
    assert state.sharded is not None
    assert state.sharded == tmp_path / "step_0000001" / "sharded"
    torch.testing.assert_close(read(state.sharded, 0, 1), expected(0, 1), rtol=0, atol=0)


def test_values_are_not_checked_where_another_process_has_done_so(group, tmp_path):
    path = saved(tmp_path, 1)
    flip(path / "sharded" / "__0_0.distcp")

    assert load_state(path, values=False).sharded == path / "sharded"
    flip(path / "sharded" / ".metadata")
    with pytest.raises(UnsafeInputError, match=r"step_0000001/sharded/\.metadata is damaged"):
        load_state(path, values=False)


def test_state_without_pieces_names_no_folder(tmp_path):
    save_state(tmp_path, 1, tensors={}, meta={}, keep=1)

    state = newest_state(tmp_path)

    assert state is not None
    assert state.sharded is None


def test_process_that_is_alone_and_gives_up_writes_nothing(tmp_path):
    write_pieces(None, {}, group=None, given_up=True)

    with pytest.raises(MachineError, match="process 0 could not begin"):
        write_pieces(None, {}, group=None)
