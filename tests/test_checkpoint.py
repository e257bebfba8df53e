import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimic_fast.checkpoint import load_state, newest_state, save_state
from mimic_fast.errors import MachineError, UnsafeInputError, UsageError

# A process that imports torch once and forks a child a line; each child goes on from the newest
# state and saves step after step until it is killed.
SAVER = """
import os, sys
from pathlib import Path
import torch
from mimic_fast.checkpoint import newest_state, save_state
torch.set_num_threads(1)
root = Path(sys.argv[1])
for _ in sys.stdin:
    pid = os.fork()
    if pid == 0:
        state = newest_state(root)
        step = 0 if state is None else state.step
        while True:
            step += 1
            full = {name: torch.full((50_000,), float(step)) for name in "abc"}
            groups = {"model": full, "moments": full}
            save_state(root, step, tensors=groups, meta={"step": step}, keep=2)
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("dead", flush=True)
"""


def save(root: Path, step: int, *, keep: int = 9, **tensors: Tensor) -> Path:
    group = tensors or {"weight": torch.full((3,), float(step))}
    return save_state(
        root, step, tensors={"model": group, "more": group}, meta={"at": step}, keep=keep
    )


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_save_state_reads_back_whole(tmp_path):
    path = save(tmp_path, 400, weight=torch.arange(6.0).reshape(2, 3))

    state = load_state(path)

    assert path.name == "step_0000400"
    assert sorted(p.name for p in path.iterdir()) == [
        "digests.json",
        "model.safetensors",
        "more.safetensors",
        "state.json",
    ]
    assert (state.path, state.step, state.meta) == (path, 400, {"at": 400})
    assert sorted(state.tensors) == ["model", "more"]
    assert torch.equal(state.tensors["model"]["weight"], torch.arange(6.0).reshape(2, 3))
    assert newest_state(tmp_path) is not None


def test_kill_9_at_any_moment_leaves_a_complete_newest_state(tmp_path):
    root = tmp_path / "state"
    moments = random.Random(7)
    steps: list[int] = []
    halves = 0
    with subprocess.Popen(
        [sys.executable, "-c", SAVER, str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as saver:
        assert saver.stdin is not None
        assert saver.stdout is not None
        for _ in range(12):
            saver.stdin.write("\n")
            saver.stdin.flush()
            child = int(saver.stdout.readline())
            start = steps[-1] if steps else 0
            while not (root / f"step_{start + 1:07d}").exists():
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.05))
            os.kill(child, signal.SIGKILL)
            assert saver.stdout.readline() == "dead\n"

            halves += any(name.startswith(".") for name in names(root))
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # no state may even look damaged
                state = newest_state(root)

            assert state is not None
            assert state.step > start
            assert state.meta == {"step": state.step}
            for group in ("model", "moments"):
                for tensor in state.tensors[group].values():
                    assert torch.equal(tensor, torch.full((50_000,), float(state.step)))
            steps.append(state.step)
        saver.stdin.close()
    assert halves > 0, "no kill fell inside a save, so this test proved nothing"


def test_stale_temporaries_are_removed_by_the_next_save(tmp_path):
    stale = tmp_path / ".tmp-step_0000007.abc"
    stale.mkdir()
    (stale / "model.safetensors").write_bytes(b"half")

    save(tmp_path, 8)

    assert names(tmp_path) == ["step_0000008"]


def test_keep_leaves_the_newest_states(tmp_path):
    for step in (100, 200, 300, 400):
        save(tmp_path, step, keep=2)

    assert names(tmp_path) == ["step_0000300", "step_0000400"]


def test_later_states_of_an_abandoned_run_are_removed(tmp_path):
    for step in (100, 200, 900):
        save(tmp_path, step)

    save(tmp_path, 300, keep=2)

    assert names(tmp_path) == ["step_0000200", "step_0000300"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 5)
    first = (tmp_path / "step_0000005" / "model.safetensors").stat().st_ino
    save(tmp_path, 5)
    assert (tmp_path / "step_0000005" / "model.safetensors").stat().st_ino == first

    save(tmp_path, 5, weight=torch.tensor(2.0))

    state = newest_state(tmp_path)
    assert state is not None
    assert state.tensors["model"]["weight"].item() == 2.0
    assert names(tmp_path) == ["step_0000005"]


def test_newest_state_counts_steps_as_numbers(tmp_path):
    save(tmp_path, 9_999_999)
    save(tmp_path, 10_000_000)
    (tmp_path / "step_notes").mkdir()

    state = newest_state(tmp_path)

    assert state is not None
    assert state.step == 10_000_000


def test_newest_state_of_nothing_is_none(tmp_path):
    assert newest_state(tmp_path / "absent") is None
    assert newest_state(tmp_path) is None


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("file", ["model.safetensors", "more.safetensors", "state.json"])
def test_damaged_state_is_refused_by_name_and_the_one_before_is_taken(tmp_path, file, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    damage(path / file)

    with pytest.raises(UnsafeInputError, match=f"step_0000002/{file}"):
        load_state(path)
    with pytest.warns(RuntimeWarning, match=f"step_0000002/{file}.*the state before it"):
        state = newest_state(tmp_path)
    assert state is not None
    assert state.step == 1


@pytest.mark.parametrize(
    "digests", ["", "[]", "{}", '{"files": {}}', '{"files": {"state.json": 1}}', "\xff"]
)
def test_damaged_digests_are_refused(tmp_path, digests):
    path = save(tmp_path, 1)
    (path / "digests.json").write_text(digests, encoding="latin-1")

    with pytest.raises(UnsafeInputError, match=r"run state .*step_0000001"):
        load_state(path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/secret.safetensors", "x.pt", ""])
def test_digests_that_name_a_foreign_file_are_refused(tmp_path, name):
    path = save(tmp_path, 1)
    listed = json.loads((path / "digests.json").read_text())
    listed["files"][name] = "0" * 64
    (path / "digests.json").write_text(json.dumps(listed))

    with pytest.raises(UnsafeInputError, match="cannot have"):
        load_state(path)


def test_state_renamed_to_another_step_is_refused(tmp_path):
    save(tmp_path, 1).rename(tmp_path / "step_0000002")

    with pytest.raises(UnsafeInputError, match="another step"):
        load_state(tmp_path / "step_0000002")


def test_missing_state_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        load_state(tmp_path / "step_0000001")


def test_unwritable_root_is_a_machine_error_that_names_it(tmp_path):
    (tmp_path / "state").write_text("a file where the directory should be")

    with pytest.raises(MachineError, match="state/step_0000001"):
        save(tmp_path / "state", 1)


def test_failed_save_leaves_the_states_before_it_alone(tmp_path):
    save(tmp_path, 1)

    with pytest.raises(TypeError):
        save_state(tmp_path, 2, tensors={}, meta={"not JSON": object()}, keep=1)

    assert names(tmp_path) == ["step_0000001"]


@pytest.mark.parametrize("name", ["../up", "Model", "", "a.b", "state.json"])
def test_group_names_that_are_no_words_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="lower-case words"):
        save_state(tmp_path, 1, tensors={name: {}}, meta={}, keep=1)


def test_shared_strided_and_empty_tensors_round_trip(tmp_path):
    base = torch.arange(24.0).reshape(1, 2, 3, 4)
    group = {
        "base": base,
        "alias": base,
        "row": base[0, 1],
        "transposed": base.transpose(1, 3),
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "expanded": torch.ones(1).expand(5),
        "none": torch.empty(0, 3),
        "scalar": torch.tensor(3),
        "grad": torch.nn.Parameter(torch.ones(2)),
    }

    save_state(tmp_path, 1, tensors={"group": group, "empty": {}}, meta={}, keep=1)

    state = newest_state(tmp_path)
    assert state is not None
    assert state.tensors["empty"] == {}
    assert state.tensors["group"].keys() == group.keys()
    for name, tensor in group.items():
        assert torch.equal(state.tensors["group"][name], tensor.detach()), name


DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]


@st.composite
def any_tensor(draw) -> Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    if dtype == torch.bool:
        count = torch.Size(shape).numel()
        values = draw(st.lists(st.booleans(), min_size=count, max_size=count))
        return torch.tensor(values, dtype=torch.bool).reshape(shape)
    size = torch.Size(shape).numel() * dtype.itemsize  # any bit pattern: NaNs, infinities, -0.0
    raw = bytearray(draw(st.binary(min_size=size, max_size=size)))
    return (torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)).reshape(
        shape
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(
    groups=st.dictionaries(
        st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True),
        st.dictionaries(st.text(min_size=1, max_size=8), any_tensor(), max_size=3),
        max_size=3,
    ),
    meta=st.dictionaries(st.text(), json_values, max_size=3),
    step=st.integers(0, 10**9),
)
def test_any_tensors_and_meta_round_trip_bit_for_bit(groups, meta, step):
    with tempfile.TemporaryDirectory() as root:
        path = save_state(Path(root), step, tensors=groups, meta=meta, keep=1)
        state = load_state(path)

    assert (state.step, state.meta) == (step, meta)
    assert state.tensors.keys() == groups.keys()
    for name, group in groups.items():
        assert state.tensors[name].keys() == group.keys()
        for key, tensor in group.items():
            found = state.tensors[name][key]
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert bits(found) == bits(tensor)
