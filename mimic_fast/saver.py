"""Run states written beside the training: a copy is taken at once, a thread writes it.

All processes of a run call the same methods at the same steps. Where the engine cuts the student
every process writes its ranges, with torch.distributed.checkpoint; else process 0 writes alone.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from mimic_fast import checkpoint
from mimic_fast.distributed import Processes, any_process
from mimic_fast.engines.engine import EngineState
from mimic_fast.engines.flat_piece import FlatPiece
from mimic_fast.errors import MachineError
from mimic_fast.sharded_state import write_pieces


@dataclass(frozen=True, kw_only=True, slots=True)
class _Copy:
    """What is to be written, independent of the training that goes on."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    pieces: Mapping[str, FlatPiece]
    cut: bool
    meta: Mapping[str, Any]


class Saver:
    """Writes run states one after the other.

    Args:
        root: Directory of all states of the run.
        processes: All of them call.
        keep: States to leave.
        background: Write in a thread; else the caller waits.
    """

    def __init__(self, root: Path, *, processes: Processes, keep: int, background: bool) -> None:
        self._root, self._processes, self._keep = root, processes, keep
        self._background = background
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        # The training goes on talking in the default group, so the thread needs one of its own.
        self._group: dist.ProcessGroup | None = None
        if dist.is_initialized():  # of one process too: what is cut is written through a group
            group = dist.new_group(backend="gloo")
            assert isinstance(group, dist.ProcessGroup)
            self._group = group

    def save(self, step: int, state: EngineState, meta: Mapping[str, Any]) -> None:
        """Copies and writes a state, once the one before is on disk; collective.

        Raises:
            MachineError: On all processes, if the state before, or without ``background`` this one,
                could not be written.
        """
        self.wait()
        copy = self._copied(step, state, meta)
        self._thread = threading.Thread(target=self._write, args=(copy,), name="saver", daemon=True)
        self._thread.start()
        if not self._background:
            self.wait()

    def wait(self) -> None:
        """Until the last state is on disk; collective.

        Raises:
            MachineError: On all processes, if one of them could not write it.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if any_process(error is not None, self._processes):
            raise error or MachineError("another process could not write its part of the run state")

    def _copied(self, step: int, state: EngineState, meta: Mapping[str, Any]) -> _Copy:
        tensors = state.tensors if self._processes.is_main else {}
        return _Copy(
            step=step,
            tensors={
                group: {name: value.detach().to("cpu", copy=True) for name, value in held.items()}
                for group, held in tensors.items()
            },
            pieces={name: piece.on_cpu() for name, piece in state.pieces.items()},
            cut=state.cut,
            meta=meta,
        )

    def _write(self, copy: _Copy) -> None:
        try:
            if self._processes.is_main:
                self._write_all(copy)
            elif copy.cut:
                write_pieces(None, copy.pieces, group=self._group)
        except BaseException as error:  # noqa: BLE001  # wait() raises it in the loop's thread
            self._error = error

    def _write_all(self, copy: _Copy) -> None:
        announced = False

        def write(folder: Path) -> None:
            nonlocal announced
            announced = True
            write_pieces(folder, copy.pieces, group=self._group)

        try:
            checkpoint.save_state(
                self._root,
                copy.step,
                tensors=copy.tensors,
                meta=copy.meta,
                keep=self._keep,
                write=write if copy.cut else None,
            )
        except BaseException:
            if copy.cut and not announced:
                write_pieces(None, {}, group=self._group, given_up=True)
            raise
