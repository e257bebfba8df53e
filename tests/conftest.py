"""Shared by all tests: one torch thread, the reference data beside the project, process groups."""

import inspect
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

# Triton reads this when it is first imported: its kernels then run on the CPU, slowly.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)
# A slow example on a busy machine is no failure.
settings.register_profile("mimic_fast", deadline=None)
settings.load_profile("mimic_fast")


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """A command ends ignoring signals, since its process ends too; the next test's does not."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [(number, signal.getsignal(number)) for number in numbers]
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of reference images beside the checkout; it is no part of the product."""
    folder = Path(__file__).parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the reference images of ../shared/data")
    return folder


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """New float tensors hold NaN and integer ones a large number: no lane is right by luck."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def empty(*args: Any, **settings: Any) -> torch.Tensor:
            tensor = allocate(*args, **settings)
            poison = float("nan") if tensor.is_floating_point() else 77
            return tensor.fill_(poison) if tensor.dtype != torch.bool else tensor

        return empty

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(scope="session")
def torchrun() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``torchrun(arguments, world=2, timeout=120)``: a script, or ``-m`` and a module.

    The exit code is torchrun's own: 1 whatever a process exited with.
    """

    def run(
        arguments: Sequence[str], *, world: int = 2, timeout: float = 120, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        process = subprocess.Popen(
            [*launcher, f"--nproc-per-node={world}", *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its processes, by force after 30 s
            try:
                output, _ = process.communicate(timeout=45)
            finally:
                process.kill()
            pytest.fail(f"{world} processes did not end in {timeout} s:\n{output[-4000:]}")
        return subprocess.CompletedProcess(process.args, process.returncode, output)

    return run


@pytest.fixture(scope="session")
def run_processes(
    torchrun: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., list[Any]]:
    """``run_processes(worker, world=2, timeout=120, **arguments)``: what each rank returned.

    ``worker`` is a function at the top of a test module; arguments and results are tensors,
    numbers, strings and containers of them. Starting costs seconds: put many checks into one
    worker.
    """

    def run(
        worker: Callable[..., Any], *, world: int = 2, timeout: float = 120, **arguments: Any
    ) -> list[Any]:
        folder = tmp_path_factory.mktemp(worker.__name__)
        torch.save(arguments, folder / "arguments.pt")
        script = [str(Path(__file__).with_name("processes.py")), inspect.getfile(worker)]
        done = torchrun(
            [*script, worker.__name__, str(folder), str(timeout)],
            world=world,
            timeout=timeout + 30,
        )
        assert done.returncode == 0, done.stdout[-8000:]
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]

    return run
