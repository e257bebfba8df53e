"""Runs under torchrun that are stopped, killed and resumed: what the tests of survival share.

As a script this file is one process of such a run: it notes its process id and, at the end, the
exit code it leaves with, which torchrun does not pass on.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

WORLD = 2
# torchrun 2.14 hands a restarted gloo group the dead one's addresses through the agent's store.
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
HARD_LIMIT = 150  # seconds that no launch takes

# Everything that has a state; an evaluation of seconds: many sets, image by image.
RECIPE = """
[encoder]
teacher = "{teacher}"
[data]
source = "{images}/train"
clean_fraction = 1.0
allow_budget = true
hold_out = 0.1
[mi]
chunk = 1
[loss]
contrastive = 0.5
[optim]
epochs = {steps}
batch_size = 16
ema = 0.9
[run]
device = "cpu"
max_steps = {steps}
checkpoint_every = {every}
[evaluation]
batch_size = 2
"""
DOWNSTREAM = """
[[evaluation.downstream]]
name = "set{number}"
train = "{images}/train"
test = "{images}/test"
"""


def write_recipe(
    path: Path, *, teacher: Path, images: Path, steps: int, every: int, sets: int = 0
) -> Path:
    """A purification of ``steps`` steps, measured on ``sets`` labeled sets."""
    text = RECIPE.format(teacher=teacher, images=images, steps=steps, every=every)
    text += "".join(DOWNSTREAM.format(number=number, images=images) for number in range(sets))
    path.write_text(text)
    return path


@dataclass(frozen=True)
class Ended:
    """How a launch ended.

    Args:
        code: torchrun's exit code.
        codes: What each process left with, by rank; absent if it could not say.
        seconds: From the last signal to the end of all.
        said: What each process wrote to stderr, by rank.
        output: What torchrun wrote, and all of the former.
    """

    code: int
    codes: dict[int, int]
    seconds: float
    said: dict[int, str]
    output: str


@dataclass
class Launch:
    """A torchrun agent at work, and the processes that it started, by rank on its node."""

    agent: subprocess.Popen[bytes]
    folder: Path
    sent: float = field(default_factory=time.monotonic)

    def pid(self, rank: int) -> int:
        """Process id of a rank, as soon as it has one."""
        file = self.folder / f"{rank}.pid"
        self.wait_for(file.exists)
        return int(file.read_text())

    def send(self, number: signal.Signals, rank: int | None = None) -> None:
        """A signal to a rank, or to the agent."""
        target = self.agent.pid if rank is None else self.pid(rank)
        self.sent = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.kill(target, number)

    def wait_for(self, ready: Callable[[], bool], *, seconds: float = HARD_LIMIT) -> None:
        """Returns as soon as ``ready``; fails if the launch ends or time runs out before."""
        end = time.monotonic() + seconds
        while not ready():
            if self.agent.poll() is not None or time.monotonic() > end:
                pytest.fail(f"it did not come to that:\n{self._output()[-6000:]}")
            time.sleep(0.001)

    def end(self, *, seconds: float = HARD_LIMIT) -> Ended:
        """Waits for the end; a launch that does not end fails the test."""
        try:
            code = self.agent.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"not ended in {seconds} s:\n{self._output()[-6000:]}")
        codes = {int(file.stem): int(file.read_text()) for file in self.folder.glob("*.code")}
        return Ended(code, codes, time.monotonic() - self.sent, self.said(), self._output())

    def said(self) -> dict[int, str]:
        """What each process has written to stderr so far."""
        return {int(file.stem): file.read_text(errors="replace") for file in self._errors()}

    def kill(self) -> None:
        """Ends whatever is left; gentle first, so that the agent ends its processes."""
        if self.agent.poll() is None:
            self.agent.kill()
            self.agent.wait()
        for file in self.folder.glob("*.pid"):
            with contextlib.suppress(ProcessLookupError):
                if _is_ours(int(file.read_text()), file):
                    os.kill(int(file.read_text()), signal.SIGKILL)

    def _output(self) -> str:
        files = [self.folder / "output", *self._errors()]
        return "\n".join(file.read_text(errors="replace") for file in files)

    def _errors(self) -> list[Path]:
        return sorted(self.folder.glob("*.err"))


class Launcher:
    """Starts launches in one directory, and ends them with the test."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.launches = directory, []

    def __call__(
        self,
        *arguments: object,
        world: int = WORLD,
        restarts: int = 0,
        before: Sequence[str] = (),
        agent: Sequence[str] = ("--standalone",),
        environment: Mapping[str, str] | None = None,
    ) -> Launch:
        """Starts ``mimic-fast ARGUMENTS`` in ``world`` processes.

        ``RANK`` in an argument becomes the process's own. ``before`` is what torchrun itself is
        started with, ``agent`` its further options.
        """
        folder = self.directory / f"launch{len(self.launches)}"
        folder.mkdir()
        torchrun = [sys.executable, "-m", "torch.distributed.run", *agent]
        script = [str(Path(__file__).resolve()), str(folder), *map(str, arguments)]
        with (folder / "output").open("wb") as output:
            process = subprocess.Popen(
                [
                    *(*before, *torchrun, f"--nproc-per-node={world}"),
                    *(f"--max-restarts={restarts}", *script),
                ],
                cwd=self.directory,
                env=os.environ
                | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
                | dict(environment or {}),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.launches.append(Launch(process, folder))
        return self.launches[-1]

    def finish(self, *arguments: object, **options: Any) -> Ended:
        """Starts, and waits for the end."""
        return self(*arguments, **options).end()

    def close(self) -> None:
        for launch in self.launches:
            launch.kill()


@contextlib.contextmanager
def launching(directory: Path) -> Iterator[Launcher]:
    """A launcher whose launches end with the block."""
    launcher = Launcher(directory)
    try:
        yield launcher
    finally:
        launcher.close()


def parts(run: Path) -> int:
    """Finished parts of step A on disk."""
    return len(list((run / "state" / "locate").glob("*.safetensors")))


def logged(run: Path) -> list[dict[str, Any]]:
    """Rows of the run's metrics; a torn last line does not count."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(run: Path) -> list[tuple[float, ...]]:
    """What every step must repeat bit for bit: number, losses, learning rate, gradient norm."""
    names = ("step", "loss", "clone", "dense", "attention", "contrastive", "lr", "grad_norm")
    return [tuple(row[name] for name in names) for row in logged(run)]


def is_saving(run: Path) -> bool:
    """Whether a state is being written at this moment."""
    return any((run / "state").glob(".tmp-*"))


def ends_like(run: Path, straight: Path) -> None:
    """The finished run and the uninterrupted one have the same losses and weights, bit for bit."""
    assert losses(run) == losses(straight)
    weights = [(path / "encoder.safetensors").read_bytes() for path in (run, straight)]
    assert weights[0] == weights[1]
    located = [
        json.loads((path / "mutual_information.json").read_text())["layers"]
        for path in (run, straight)
    ]
    assert located[0] == located[1]
    assert (run / "report.json").exists()


def _is_ours(pid: int, file: Path) -> bool:
    """Whether the process of that id still is the one that wrote the file."""
    try:
        return str(file.parent).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def main(folder: str, arguments: list[str]) -> None:
    """The program, with notes of its process id, errors and exit code in ``folder``."""
    rank, local = os.environ["RANK"], os.environ["LOCAL_RANK"]
    errors = os.open(Path(folder, f"{local}.err"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(errors, 2)
    _note(Path(folder, f"{local}.code"), None)
    _note(Path(folder, f"{local}.pid"), os.getpid())
    sys.argv = ["mimic-fast", *(text.replace("RANK", rank) for text in arguments)]
    code = 1
    try:
        from mimic_fast.launch.cli import main as mimic_fast

        mimic_fast()
    except SystemExit as error:
        code = int(error.code or 0)
        raise
    finally:
        _note(Path(folder, f"{local}.code"), code)


def _note(path: Path, value: int | None) -> None:
    path.unlink(missing_ok=True)
    if value is not None:
        work = path.with_suffix(".new")
        work.write_text(str(value))
        work.rename(path)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
