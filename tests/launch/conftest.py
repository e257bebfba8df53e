"""Command lines in real processes of their own, and what they work on."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mimic_fast.config import EncoderSpec
from mimic_fast.encoders.build import build_encoder
from mimic_fast.encoders.export import export_encoder

# Imports what every command needs once (seconds) and forks a process for each command line, with
# an exit code and output files of its own. A line is "stdout, stderr, directory, arguments".
SERVER = """
import json, os, sys
import torch
torch.set_num_threads(1)
import accelerate, jinja2, matplotlib.figure, timm
import mimic_fast.distil, mimic_fast.evidence, mimic_fast.pretraining, mimic_fast.attacks.badencoder
for line in sys.stdin:
    out, err, directory, arguments = json.loads(line)
    pid = os.fork()
    if pid == 0:
        for number, name in ((1, out), (2, err)):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(directory)
        sys.argv = ["mimic-fast", *arguments]
        code = 1
        try:
            from mimic_fast.launch.cli import main
            main()
        except SystemExit as error:
            code = error.code or 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Done:
    """How a command line ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The last line on stderr, and the only error; lines before it may say what went on."""
        *before, last = self.err.splitlines()
        assert last.startswith("error: "), self.err
        assert not any(line.startswith(("error: ", "Traceback")) for line in before), self.err
        return last


@dataclass
class Running:
    """A command line at work."""

    pid: int
    server: subprocess.Popen[str]
    files: tuple[Path, Path] = field(repr=False)

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait_for(self, ready: Callable[[], bool], *, seconds: float = 60) -> None:
        """Returns once ``ready``; ends the process and fails if that does not come in time."""
        end = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > end:
                self.signal(signal.SIGKILL)
                pytest.fail(f"not ready in {seconds} s: {self.wait()}")
            time.sleep(0.01)

    def wait(self) -> Done:
        assert self.server.stdout is not None
        code = int(self.server.stdout.readline())
        out, err = (path.read_text() for path in self.files)
        return Done(code, out, err)


class CommandLine:
    """Runs command lines in one directory."""

    def __init__(self, server: subprocess.Popen[str], directory: Path) -> None:
        self.server, self.directory, self.count = server, directory, 0

    def start(self, *arguments: object) -> Running:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.count += 1
        logs = self.directory / ".logs"
        logs.mkdir(exist_ok=True)
        files = logs / f"{self.count}.out", logs / f"{self.count}.err"
        line = [*map(str, files), str(self.directory), [str(item) for item in arguments]]
        self.server.stdin.write(json.dumps(line) + "\n")
        self.server.stdin.flush()
        return Running(int(self.server.stdout.readline()), self.server, files)

    def __call__(self, *arguments: object) -> Done:
        return self.start(*arguments).wait()


@pytest.fixture(scope="session")
def server() -> Iterator[subprocess.Popen[str]]:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def cli(server, tmp_path) -> CommandLine:
    """Calls ``mimic-fast`` with the given arguments in ``tmp_path``."""
    return CommandLine(server, tmp_path)


@pytest.fixture
def program() -> Callable[..., Done]:
    """Calls the real program, from the interpreter on; for what needs no torch."""

    def run(*arguments: str) -> Done:
        command = [sys.executable, "-m", "mimic_fast", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return Done(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def quick() -> tuple[str, ...]:
    """Options for seconds of work: two epochs, and all images, as there are few."""
    return (
        *("--set", "data.clean_fraction=1", "--allow-budget"),
        *("--set", "optim.epochs=2", "--set", "optim.batch_size=30", "--device", "cpu"),
    )


HALF: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
SPECS = {
    "resnet": EncoderSpec(
        architecture="timm:resnet18",
        arguments={"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64]},
        stem="small_stride2",
        image_size=16,
        **HALF,
    ),
    "vit": EncoderSpec(
        architecture="timm:vit_tiny_patch16_224",
        arguments={"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2},
        image_size=16,
        **HALF,
    ),
}


@pytest.fixture(scope="session")
def encoders(tmp_path_factory) -> dict[str, Path]:
    """Small encoders on disk, by name."""
    folder = tmp_path_factory.mktemp("encoders")
    return {
        name: export_encoder(
            build_encoder(spec, seed=3).eval(), folder, name=name, key_map=None, card={}
        )
        for name, spec in SPECS.items()
    }


@pytest.fixture
def teacher(encoders) -> Path:
    return encoders["resnet"]


def picture(seed: int, label: int) -> bytes:
    """A PNG of 16 x 16 smooth random pixels; the label decides its mean color."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 120, (4, 4, 3)) + 45 * np.array([label, 1 - label, 1])
    pixels = np.kron(coarse, np.ones((4, 4, 1))) + generator.integers(0, 20, (16, 16, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def labeled(tmp_path_factory) -> Path:
    """A labeled set of two classes: train/ with 100 images, test/ with 40."""
    root = tmp_path_factory.mktemp("labeled")
    for split, count in (("train", 100), ("test", 40)):
        for index in range(count):
            folder = root / split / ("dark", "light")[index % 2]
            folder.mkdir(parents=True, exist_ok=True)
            seed = index if split == "train" else 1000 + index
            (folder / f"{index:03d}.png").write_bytes(picture(seed, index % 2))
    return root
