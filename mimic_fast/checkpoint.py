"""The state of a run on disk: whole or absent, digest-checked, and enough to go on bit for bit.

``state/step_0000400/`` holds one safetensors file per group of tensors, ``state.json`` and, written
last, ``digests.json``. The directory is filled under a temporary name, fsynced and renamed, so a
process killed at any moment leaves either the complete state or none. What is cut over processes
lies in ``sharded/``, written by ``sharded_state.py``; all else is never unpickled.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mimic_fast.errors import MachineError, UnsafeInputError, UsageError
from mimic_fast.files import fsync_directory, machine_errors, sha256_file

_STATE_NAME = re.compile(r"step_(\d{7,})")
_GROUP_NAME = re.compile(r"[a-z][a-z0-9_]*")
_SHARDED_NAME = re.compile(r"sharded/(\.metadata|__\d+_\d+\.distcp)")
_SHARDED = "sharded"
_TEMPORARY = ".tmp-"


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """One complete state, read back.

    Args:
        path: Its directory.
        step: Optimizer steps done when it was saved.
        tensors: Groups of named tensors, on the CPU.
        meta: The JSON that was saved beside them.
        sharded: Folder of what is cut over processes, its digests compared; None: nothing is.
    """

    path: Path
    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    meta: Mapping[str, Any]
    sharded: Path | None = None


def save_state(
    root: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    meta: Mapping[str, Any],
    keep: int,
    write: Callable[[Path], None] | None = None,
) -> Path:
    """Saves the state of ``step`` atomically and removes all but the newest ``keep`` states.

    States of later steps are removed too: they are damaged, or of a run that this one replaced.
    One process of a run calls this. Saving equal content again leaves the directory as it is.

    Args:
        root: Directory of all states of the run.
        step: Optimizer steps done.
        tensors: Groups of named tensors; a group becomes ``GROUP.safetensors``.
        meta: Anything that JSON can hold.
        keep: Number of states to leave, at least 1.
        write: Fills a folder with what is cut over processes; None: nothing is.

    Returns:
        The state's directory.

    Raises:
        MachineError: If it cannot be written; the states saved before are untouched.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"step must be >= 0 and keep >= 1, got step {step} and keep {keep}")
    for name in tensors:
        if not _GROUP_NAME.fullmatch(name):
            raise ValueError(f"group names are lower-case words, got {name!r}")
    target = root / f"step_{step:07d}"
    with machine_errors(target):
        root.mkdir(parents=True, exist_ok=True)
        _remove_temporaries(root)
        work = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY}{target.name}.", dir=root))
        try:
            if write is not None:
                (work / _SHARDED).mkdir()
                write(work / _SHARDED)
            _fill(work, step, tensors, meta)
            _put_in_place(work, target)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        _remove_old(root, step, keep)
    return target


def load_state(path: Path, *, values: bool = True) -> State:
    """Reads one state and checks every byte of it against its digests.

    Args:
        path: Its directory.
        values: Check the values of what is cut too; False where another process has done so.

    Raises:
        UsageError: If there is no such directory.
        UnsafeInputError: If it is incomplete, damaged or altered; the message names the file.
    """
    name = _STATE_NAME.fullmatch(path.name)
    if name is None or not path.is_dir():
        raise UsageError(f"run state {path} does not exist; states are directories 'step_0000400'")
    digests = _read_json(path / "digests.json").get("files")
    if not isinstance(digests, dict) or "state.json" not in digests:
        raise UnsafeInputError(f"run state {path / 'digests.json'} lists no files; it is damaged")
    for file in sorted(digests):
        if values or not file.endswith(".distcp"):
            _check_file(path, file, digests[file])
    state = _read_json(path / "state.json")
    if state.get("step") != int(name[1]) or not isinstance(state.get("meta"), dict):
        raise UnsafeInputError(
            f"run state {path / 'state.json'} is of another step: it says {state.get('step')}"
        )
    groups = [Path(file).stem for file in sorted(digests) if _is_group(file)]
    return State(
        path=path,
        step=int(name[1]),
        tensors={group: _read_tensors(path / f"{group}.safetensors") for group in groups},
        meta=state["meta"],
        sharded=path / _SHARDED if any(map(_SHARDED_NAME.fullmatch, digests)) else None,
    )


def newest_state(root: Path) -> State | None:
    """The newest state that is whole; None if there is none.

    A damaged one is refused with a warning that names its file, and the one before it is tried.
    """
    for _, path in sorted(_states(root), reverse=True):
        try:
            return load_state(path)
        except UnsafeInputError as error:
            warnings.warn(f"{error}; trying the state before it", RuntimeWarning, stacklevel=2)
    return None


def newest_meta(root: Path) -> tuple[Path, Mapping[str, Any]] | None:
    """Path and ``meta`` of the newest state, read without its tensors; None if there is none."""
    for _, path in sorted(_states(root), reverse=True):
        try:
            digests = _read_json(path / "digests.json").get("files")
            digest = digests.get("state.json") if isinstance(digests, dict) else None
            _check_file(path, "state.json", digest)
            return path, _read_json(path / "state.json")["meta"]
        except UnsafeInputError:
            continue  # newest_state names the damaged one
    return None


def refuse_other_run(path: Path, meta: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Compares the fingerprint in a state's ``meta`` with what is known of the present run.

    Raises:
        UsageError: If they differ.
    """
    saved = meta.get("fingerprint", {})
    if any(saved.get(name) != value for name, value in json.loads(json.dumps(dict(known))).items()):
        raise UsageError(
            f"the state in {path} belongs to other settings, teacher or images; "
            "use another --out or the settings in its config.json"
        )


def _fill(
    work: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any]
) -> None:
    digests: dict[str, str] = {}
    for name, group in tensors.items():
        file = work / f"{name}.safetensors"
        try:
            save_file(_independent(group), file)
        except SafetensorError as error:  # the library wraps the system's error in its own
            raise MachineError(f"cannot write {file}: {error}; free space") from None
        digests[file.name] = sha256_file(file)
    for file in sorted((work / _SHARDED).glob("*")):
        digests[f"{_SHARDED}/{file.name}"] = sha256_file(file)
    state = json.dumps({"step": step, "meta": dict(meta)}, indent=1).encode()
    (work / "state.json").write_bytes(state)
    digests["state.json"] = hashlib.sha256(state).hexdigest()
    (work / "digests.json").write_text(json.dumps({"files": digests}, indent=1) + "\n")
    for file in work.rglob("*"):
        _fsync_file(file)  # folders too
    work.chmod(0o755)  # mkdtemp makes it private to the user
    fsync_directory(work)


def _independent(group: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CPU copies that safetensors accepts: contiguous, no two in one storage."""
    result: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in group.items():
        tensor = value.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        result[name] = tensor
    return result


def _put_in_place(work: Path, target: Path) -> None:
    if target.exists():
        if _same(work, target):
            shutil.rmtree(work)
            return
        _discard(target)
    work.rename(target)
    fsync_directory(target.parent)


def _same(work: Path, target: Path) -> bool:
    try:
        load_state(target)
    except UnsafeInputError:
        return False
    return (work / "digests.json").read_bytes() == (target / "digests.json").read_bytes()


def _remove_old(root: Path, step: int, keep: int) -> None:
    states = sorted(_states(root))
    kept = [path for number, path in states if number <= step][-keep:]
    for _, path in states:
        if path not in kept:
            _discard(path)


def _discard(path: Path) -> None:
    """Removes a state under another name, so that a kill half-way leaves no half state."""
    doomed = path.with_name(f"{_TEMPORARY}{path.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def _remove_temporaries(root: Path) -> None:
    for path in root.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path)


def _states(root: Path) -> list[tuple[int, Path]]:
    if not root.is_dir():
        return []
    matches = ((_STATE_NAME.fullmatch(path.name), path) for path in root.iterdir())
    return [(int(match[1]), path) for match, path in matches if match and path.is_dir()]


def _check_file(directory: Path, name: str, digest: object) -> None:
    if name != "state.json" and not _is_group(name) and not _SHARDED_NAME.fullmatch(name):
        raise UnsafeInputError(f"run state {directory} lists a file it cannot have: {name!r}")
    path = directory / name
    try:
        found = sha256_file(path)
    except OSError as error:
        raise UnsafeInputError(f"run state {path} cannot be read: {error.strerror}") from None
    if found != digest:
        raise UnsafeInputError(f"run state {path} is damaged: its SHA-256 is not the recorded one")


def _is_group(file: str) -> bool:
    group = file.removesuffix(".safetensors")
    return group != file and _GROUP_NAME.fullmatch(group) is not None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UnsafeInputError(f"run state {path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UnsafeInputError(f"run state {path} is damaged: it holds no JSON object")
    return value


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UnsafeInputError(f"run state {path} cannot be read: {error}") from None


def _fsync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
