"""The cut part of a run state: ranges of tensors, by torch.distributed.checkpoint.

Its ``.metadata`` is a pickle of torch's own, written by this run: ``checkpoint.py`` compares its
digest with the recorded one before it is opened. The values themselves are read without unpickling.
"""

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from mimic_fast import checkpoint
from mimic_fast.distributed import Processes, any_process, broadcast_json
from mimic_fast.engines.flat_piece import FlatPiece
from mimic_fast.errors import MachineError, UnsafeInputError, UsageError


class _SavePlanner(DefaultSavePlanner):
    """Finds the values behind a range, which the default looks for in tensors only."""

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].values


class _LoadPlanner(DefaultLoadPlanner):
    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        # The default's own drops values that are no tensors.
        self.original_state_dict = self.state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator
        self.flatten_state_dict = False

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].values


def write_pieces(
    folder: Path | None,
    pieces: Mapping[str, FlatPiece],
    *,
    group: dist.ProcessGroup | None,
    given_up: bool = False,
) -> None:
    """Writes the ranges of all processes of ``group`` into a folder that process 0 names.

    Args:
        folder: On process 0; None elsewhere.
        pieces: This process's ranges.
        group: Of all processes, with a CPU backend; None: this process is alone.
        given_up: Process 0 tells the others that there will be none.

    Raises:
        MachineError: On every process, if one of them cannot write.
    """
    box = [None if folder is None or given_up else str(folder)]
    if group is not None:
        dist.broadcast_object_list(box, src=0, group=group)
    if given_up:
        return
    if box[0] is None:
        raise MachineError("process 0 could not begin to write the run state")
    try:
        save(
            dict(pieces),
            storage_writer=FileSystemWriter(box[0], overwrite=True),
            planner=_SavePlanner(),
            process_group=group,
            no_dist=group is None,
        )
    except CheckpointException as error:
        raise MachineError(f"cannot write {box[0]}: {_cause(error)}; free space") from None


def read_pieces(folder: Path, pieces: Mapping[str, FlatPiece]) -> None:
    """Fills ranges from a folder that was written by any number of processes; collective."""
    load(dict(pieces), storage_reader=FileSystemReader(folder), planner=_LoadPlanner())


def newest_for_all(root: Path, processes: Processes) -> checkpoint.State | None:
    """The newest whole state, the same for all processes; collective.

    Process 0 looks and checks every byte; the others check what they open themselves.

    Raises:
        UsageError: If they do not see the same folder.
        UnsafeInputError: If one of them cannot read what process 0 could.
    """
    state = checkpoint.newest_state(root) if processes.is_main else None
    name = broadcast_json(None if state is None else state.path.name, processes)
    seen = processes.is_main or name is None or (root / name).is_dir()
    if any_process(not seen, processes):
        raise UsageError(
            f"not all processes see the state {name} in {root}; --out must be one folder that all "
            "of them see"
        )
    problem = None
    if name is not None and not processes.is_main:
        try:
            state = checkpoint.load_state(root / name, values=False)
        except (UnsafeInputError, UsageError, OSError) as error:  # the others would wait for it
            problem = error
    if any_process(problem is not None, processes):
        raise problem or UnsafeInputError(
            f"another process cannot read the state {name} in {root}; its own line says why"
        )
    return state


def _cause(error: CheckpointException) -> str:
    """What the system said, without torch's tracebacks of every process."""
    causes = [wrapped[0] for wrapped in error.failures.values()]
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno is not None:
            return errno.errorcode.get(cause.errno, "") + f" {cause.strerror}"
    return "; ".join(" ".join(str(cause).split())[:200] for cause in causes)
