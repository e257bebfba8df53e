"""What is kept of a run that diverged, so that its last bad step can be run again.

``RUN/diverged/`` holds ``rank_00000.safetensors`` ... (each process's share of the batch),
``student.safetensors`` (weights and statistics, which skipped steps left as they were) and, written
last, ``diverged.json``: the settings, the facts the step hangs on, and every file's digest. A dump
without that file is not complete. Safetensors and JSON only.
"""

import hashlib
import json
import math
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mimic_fast.config import EncoderSpec, Frozen, Settings
from mimic_fast.data.loader import Batch
from mimic_fast.errors import MachineError, UnsafeInputError, UsageError
from mimic_fast.files import fsync_directory, machine_errors, sha256_file, write_atomic
from mimic_fast.recipe import validated
from mimic_fast.version import VERSION

INDEX = "diverged.json"
STUDENT = "student.safetensors"
_VIEWS = ("v1", "v2", "plain", "student")


class StepFacts(Frozen):
    """What a step hangs on besides weights and batch; the ``meta`` of a dump."""

    settings: Settings = Field(description="of the run")
    spec: EncoderSpec = Field(description="of teacher and student")
    taps: tuple[str, ...] = Field(description="module paths, shallow to deep")
    layer_weights: tuple[float, ...] = Field(description="lambda_l per tap")
    teacher: str | None = Field(description="SHA-256 of the teacher's file; None: no teacher")
    loss_scale: float = Field(default=1.0, gt=0, description="of an fp16 step")
    rows: tuple[dict[str, Any], ...] = Field(
        default=(), description="rows of metrics.jsonl up to the step"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Diverged:
    """A dump, read back and checked.

    Args:
        folder: Where it lies.
        step: Step of the run, from 1, whose batch this is.
        facts: What was recorded of the run.
        student: State of :class:`mimic_fast.step.Student`, on the CPU.
        batch: The global batch: every process's share, in rank order.
        world: Processes that shared it.
        versions: Of what ran.
    """

    folder: Path
    step: int
    facts: StepFacts
    student: Mapping[str, Tensor]
    batch: Batch
    world: int
    versions: Mapping[str, str]


def dump_diverged(
    folder: Path,
    *,
    step: int,
    student: Mapping[str, Tensor] | None,
    batch: Batch,
    rank: int,
    world: int,
    meta: Mapping[str, Any],
) -> Path:
    """Writes this process's share of a bad step; all processes of the run call it.

    An earlier dump in ``folder``, which all processes must see, is replaced. Under a process group
    the digests are gathered, so that a process that cannot write makes all of them raise.

    Args:
        folder: ``RUN/diverged``.
        step: From 1, as in metrics.jsonl.
        student: Its whole state; read on process 0 only, None elsewhere.
        batch: As the loader made it for this process.
        rank: Of this process.
        world: Number of processes.
        meta: Fields of :class:`StepFacts`.

    Returns:
        ``folder``.

    Raises:
        ValueError: If process 0 has no student, or ``meta`` lacks something.
        MachineError: If a process cannot write.
    """
    if rank == 0 and student is None:
        raise ValueError("process 0 dumps the student: expected its state, got None")
    facts = validated(StepFacts, meta)
    digests: dict[str, str] = {}
    problem = ""
    try:
        if rank == 0:
            (folder / INDEX).unlink(missing_ok=True)  # incomplete from here on
            digests[STUDENT] = _write_tensors(folder / STUDENT, student or {})
        share = folder / _rank_file(rank)
        digests[share.name] = _write_tensors(share, _batch_tensors(batch))
    except (MachineError, OSError) as error:  # the others would wait for this process
        problem = str(error)
    for other in _gathered((digests, problem), world):
        digests |= other[0]
        problem = problem or other[1]
    if problem:
        raise MachineError(problem)
    if rank == 0:
        content = {
            "step": step,
            "world": world,
            "facts": facts.model_dump(mode="json"),
            "versions": _versions(),
            "files": digests,
        }
        text = json.dumps(_nulled(content | {"sha256": _digest(content)}), indent=1) + "\n"
        write_atomic(folder / INDEX, text.encode())
        for path in folder.glob("rank_*.safetensors"):
            if path.name not in digests:  # of an earlier dump by more processes
                path.unlink()
    return folder


def load_diverged(folder: Path) -> Diverged:
    """Reads a dump and checks every byte of it against its digests.

    Raises:
        UsageError: If there is no dump, or a file of it is missing; the message names it.
        UnsafeInputError: If it is damaged or altered.
    """
    content = _read_index(folder / INDEX)
    digests, world = content["files"], content["world"]
    shares = [_rank_file(rank) for rank in range(world)]
    for name in (STUDENT, *shares):
        _check(folder / name, digests.get(name))
    parts = [_read_tensors(folder / name) for name in shares]
    if any(part.keys() != parts[0].keys() or "v1" not in part for part in parts):
        raise UnsafeInputError(f"{folder}: the processes' batches hold different views; damaged")
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Diverged(
        folder=folder,
        step=content["step"],
        facts=validated(StepFacts, content["facts"]),
        student=_read_tensors(folder / STUDENT),
        batch=Batch(
            ids=joined["ids"], v1=joined["v1"], **{name: joined.get(name) for name in _VIEWS[1:]}
        ),
        world=world,
        versions=content["versions"],
    )


def _batch_tensors(batch: Batch) -> dict[str, Tensor]:
    views = {name: getattr(batch, name) for name in _VIEWS}
    return {"ids": batch.ids} | {name: v for name, v in views.items() if v is not None}


def _rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def _gathered(own: tuple[dict[str, str], str], world: int) -> Sequence[tuple[dict[str, str], str]]:
    if world == 1:
        return [own]
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, own)
    return everyone


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Writes one file whole or not at all; returns its digest."""
    # Copies: views of one storage, which safetensors refuses, come apart.
    own = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    with machine_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        try:
            save_file(own, name)  # which may put another file in place of the one just closed
            with open(name, "rb") as file:
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            digest = sha256_file(Path(name))
            os.replace(name, path)
        except SafetensorError as error:  # the library wraps the system's error in its own
            raise MachineError(f"cannot write {path}: {error}; free space") from None
        finally:
            Path(name).unlink(missing_ok=True)
        fsync_directory(path.parent)
    return digest


def _versions() -> dict[str, str]:
    return {"mimic_fast": VERSION, "torch": torch.__version__, "python": platform.python_version()}


def _nulled(value: Any) -> Any:
    """JSON has no NaN: numbers that are not finite become null, as in metrics.jsonl."""
    if isinstance(value, Mapping):
        return {key: _nulled(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_nulled(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(_nulled(content), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _read_index(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UsageError(
            f"{path} does not exist: no complete dump of a diverged step; give the folder "
            "'diverged' of a run that ended with exit code 5"
        )
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UnsafeInputError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict) or content.pop("sha256", None) != _digest(content):
        raise UnsafeInputError(f"{path} is damaged: its SHA-256 is not the recorded one")
    return content


def _check(path: Path, digest: object) -> None:
    if not path.is_file():
        raise UsageError(
            f"the dump is incomplete: {path} does not exist; copy the whole folder 'diverged'"
        )
    if sha256_file(path) != digest:
        raise UnsafeInputError(f"{path} is damaged: its SHA-256 is not the recorded one")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UnsafeInputError(f"{path} cannot be read: {error}") from None
