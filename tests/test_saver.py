"""Run states in the background: what was saved is what is written, and no error is lost."""

import json
import resource
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mimic_fast import checkpoint
from mimic_fast.checkpoint import load_state
from mimic_fast.distributed import SINGLE, Processes
from mimic_fast.engines.engine import EngineState
from mimic_fast.engines.flat_piece import FlatPiece
from mimic_fast.errors import MachineError
from mimic_fast.saver import Saver
from mimic_fast.sharded_state import read_pieces

TOTAL = 3000  # values of a tensor that is cut


def a_state(value: float = 1.0) -> EngineState:
    weights = {"a.weight": torch.arange(6.0).reshape(2, 3) * value, "a.bias": torch.zeros(2)}
    return EngineState(tensors={"student": weights, "rng": {"0.torch": torch.arange(5)}})


def a_saver(root: Path, *, keep: int = 9, background: bool = True) -> Saver:
    return Saver(root, processes=SINGLE, keep=keep, background=background)


def steps(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def files(state: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in state.iterdir()}


class Gate:
    """Holds the writing back until it is opened; what writes is the real thing."""

    def __init__(self, write: Callable[..., Path]) -> None:
        self.opened, self.done = threading.Event(), 0
        self._write = write

    def __call__(self, *arguments: Any, **named: Any) -> Path:
        assert self.opened.wait(10)
        path = self._write(*arguments, **named)
        self.done += 1
        return path


@pytest.fixture
def gate(monkeypatch) -> Gate:
    gate = Gate(checkpoint.save_state)
    monkeypatch.setattr(checkpoint, "save_state", gate)
    return gate


def test_state_of_the_background_is_that_of_the_foreground(tmp_path):
    for name, background in (("back", True), ("fore", False)):
        saver = a_saver(tmp_path / name, background=background)
        saver.save(7, a_state(), {"world": 1})
        saver.wait()

    back, fore = (tmp_path / name / "step_0000007" for name in ("back", "fore"))
    assert files(back) == files(fore)
    assert load_state(back).meta == {"world": 1}
    torch.testing.assert_close(dict(load_state(back).tensors), a_state().tensors, rtol=0, atol=0)


def test_save_comes_back_before_the_state_is_on_disk(tmp_path, gate):
    saver = a_saver(tmp_path)

    saver.save(1, a_state(), {})

    assert gate.done == 0
    gate.opened.set()
    saver.wait()
    assert gate.done == 1
    saver.wait()  # nothing more to wait for
    assert gate.done == 1


def test_what_changes_after_save_is_not_written(tmp_path, gate):
    state, saver = a_state(), a_saver(tmp_path)
    expected = {name: value.clone() for name, value in state.tensors["student"].items()}

    saver.save(1, state, {})
    for value in state.tensors["student"].values():
        value.fill_(torch.nan)
    gate.opened.set()
    saver.wait()

    found = load_state(tmp_path / "step_0000001").tensors["student"]
    torch.testing.assert_close(dict(found), expected, rtol=0, atol=0)


def test_next_save_waits_for_the_one_before(tmp_path, gate):
    saver = a_saver(tmp_path)
    saver.save(1, a_state(), {})
    timer = threading.Timer(0.2, gate.opened.set)
    timer.start()

    saver.save(2, a_state(), {})

    assert gate.opened.is_set()
    assert gate.done >= 1
    saver.wait()
    timer.join()
    assert steps(tmp_path) == ["step_0000001", "step_0000002"]


def test_foreground_save_comes_back_with_the_state_on_disk(tmp_path, gate):
    gate.opened.set()

    a_saver(tmp_path, background=False).save(1, a_state(), {})

    assert gate.done == 1


@pytest.mark.parametrize("keep", [1, 2])
def test_newest_states_are_kept(tmp_path, keep):
    saver = a_saver(tmp_path, keep=keep)
    for step in (10, 20, 30):
        saver.save(step, a_state(step), {})
    saver.wait()

    assert steps(tmp_path) == [f"step_{step:07d}" for step in (10, 20, 30)[-keep:]]
    found = load_state(tmp_path / "step_0000030").tensors["student"]["a.weight"]
    assert torch.equal(found, a_state(30).tensors["student"]["a.weight"])


def test_error_of_the_thread_comes_out_once_of_whatever_is_called_next(tmp_path):
    root = tmp_path / "state"
    root.write_text("a file where the folder should be")
    saver = a_saver(root)

    saver.save(1, a_state(), {})
    with pytest.raises(MachineError, match=r"cannot write .*state/step_0000001"):
        saver.save(2, a_state(), {})
    saver.save(3, a_state(), {})
    with pytest.raises(MachineError, match=r"cannot write .*state/step_0000003"):
        saver.wait()
    saver.wait()

    root.unlink()
    saver.save(4, a_state(), {})
    saver.wait()
    assert steps(root) == ["step_0000004"]


def test_foreground_error_comes_out_of_its_own_save(tmp_path):
    (tmp_path / "state").write_text("a file where the folder should be")

    with pytest.raises(MachineError, match="step_0000001"):
        a_saver(tmp_path / "state", background=False).save(1, a_state(), {})


def test_error_that_is_not_of_the_machine_is_not_lost(tmp_path):
    saver = a_saver(tmp_path)
    saver.save(1, a_state(), {"not JSON": object()})

    with pytest.raises(TypeError, match="not JSON serializable"):
        saver.wait()
    assert steps(tmp_path) == []


# Two processes.


def share(processes: Processes, value: float = 1.0) -> dict[str, FlatPiece]:
    """Unequal ranges of one tensor."""
    first, last = ((0, 1000), (1000, TOTAL))[processes.rank]
    values = torch.arange(float(TOTAL))[first:last] * value
    return {"weights/a": FlatPiece(values, offset=first, total=TOTAL)}


def said(call: Callable[[], None]) -> str:
    try:
        call()
    except MachineError as error:
        return str(error)
    return ""


def both_ways(root: Path, processes: Processes) -> dict[str, Any]:
    """A state that is cut, by both ways, its ranges changed after ``save``."""
    read: dict[str, Tensor] = {}
    for name, background in (("back", True), ("fore", False)):
        saver = Saver(root / name, processes=processes, keep=2, background=background)
        for step in (1, 2, 3):
            pieces = share(processes, step)
            tensors: Mapping[str, Mapping[str, Tensor]] = {"buffers": {"n": torch.tensor(step)}}
            saver.save(step, EngineState(tensors=tensors, pieces=pieces, cut=True), {"n": step})
            pieces["weights/a"].values.fill_(torch.nan)
        saver.wait()
        found = FlatPiece(torch.full((TOTAL,), torch.nan), offset=0, total=TOTAL)
        read_pieces(root / name / "step_0000003" / "sharded", {"weights/a": found})
        read[name] = found.values
    return read


def errors(root: Path, processes: Processes) -> dict[str, list[str]]:
    """What every process is told, by what went wrong."""
    found: dict[str, list[str]] = {}
    blocked = root / "blocked"
    if processes.is_main:
        blocked.write_text("a file where the folder should be")
    dist.barrier()
    for name, cut in (("whole", False), ("cut", True)):
        saver = Saver(blocked, processes=processes, keep=2, background=True)
        state = EngineState(
            tensors=a_state().tensors, pieces=share(processes) if cut else {}, cut=cut
        )
        saver.save(1, state, {})
        again = said(lambda saver=saver, state=state: saver.save(2, state, {}))
        found[name] = [again, said(saver.wait)]

    # The disk of process 1 alone is full.
    saver = Saver(root / "full", processes=processes, keep=2, background=True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not processes.is_main:
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, before[1]))
    saver.save(1, EngineState(tensors={}, pieces=share(processes), cut=True), {})
    found["full"] = [said(saver.wait)]
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    saver.save(2, EngineState(tensors={}, pieces=share(processes), cut=True), {})
    found["full"].append(said(saver.wait))
    return found


def worker(root: str) -> dict[str, Any]:
    dist.init_process_group("gloo")
    processes = Processes(rank=dist.get_rank(), world=2, device=torch.device("cpu"))
    return {
        "read": both_ways(Path(root), processes),
        "errors": errors(Path(root), processes),
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def two_processes(run_processes, root) -> list[dict[str, Any]]:
    return run_processes(worker, world=2, root=str(root))


def test_cut_state_is_the_same_from_both_ways(two_processes, root):
    for result in two_processes:
        for values in result["read"].values():
            assert torch.equal(values, torch.arange(float(TOTAL)) * 3)
    for way in ("back", "fore"):
        assert steps(root / way) == ["step_0000002", "step_0000003"]
    back, fore = (load_state(root / way / "step_0000003") for way in ("back", "fore"))
    assert back.meta == fore.meta == {"n": 3}
    assert back.tensors["buffers"] == fore.tensors["buffers"] == {"n": torch.tensor(3)}
    listed = [json.loads((s.path / "digests.json").read_text())["files"] for s in (back, fore)]
    for digests in listed:
        assert {"sharded/__0_0.distcp", "sharded/__1_0.distcp"} < digests.keys()
        del digests["sharded/.metadata"]  # it names its folder
    assert listed[0] == listed[1]


@pytest.mark.parametrize("kind", ["whole", "cut"])
def test_error_of_process_0_comes_out_on_all(two_processes, kind):
    main, other = (result["errors"][kind] for result in two_processes)

    assert "step_0000001" in main[0]
    assert "cannot write" in main[0]
    assert "process" in other[0]
    assert main[1] == other[1] == ""  # the second save was never begun


def test_error_of_another_process_comes_out_on_all(two_processes, root):
    for result in two_processes:
        error, then = result["errors"]["full"]
        assert "EFBIG" in error
        assert "\n" not in error
        assert then == ""
    assert steps(root / "full") == ["step_0000002"]
