"""The job script at work: real processes, and stand-ins for what only a cluster has.

``srun`` and ``scontrol`` are written to PATH and do what the script counts on.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mimic_fast.launch.cli import app

ROOT = Path(__file__).parents[2]

# As srun of Slurm 17.11 to 25.11: a first bad end has all processes of all tasks get SIGTERM, and
# SIGKILL after KillWait; the answer is the highest code, and a death by a signal outranks codes.
SRUN = """
import json, os, signal, subprocess, sys, time
words = sys.argv[1:]
options = [word for word in words[: words.index("bash")]]
assert "--kill-on-bad-exit=1" in options and "--wait=0" in options, options
count = int(os.environ["SLURM_NTASKS"])
tasks = []
for rank in range(count):
    place = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
    command, env = words[len(options):], os.environ | place
    tasks.append(subprocess.Popen(command, env=env, start_new_session=True))
with open(os.environ["STEP"] + ".new", "w") as file:
    json.dump([task.pid for task in tasks], file)
os.rename(os.environ["STEP"] + ".new", os.environ["STEP"])
def tell(number):
    for task in tasks:
        try:
            os.killpg(task.pid, number)
        except ProcessLookupError:
            pass
kill_at = None
while None in [task.poll() for task in tasks]:
    if kill_at is None and any(task.returncode for task in tasks):
        tell(signal.SIGTERM)
        kill_at = time.monotonic() + 30
    if kill_at is not None and time.monotonic() > kill_at:
        tell(signal.SIGKILL)
    time.sleep(0.005)
codes = [task.returncode for task in tasks]
print("codes", codes, file=sys.stderr)
sys.exit(128 - min(codes) if min(codes) < 0 else max(codes))
"""
SCONTROL = """#!/bin/bash
case "$*" in
    "show hostnames "*) printf 'localhost\\nother\\n' ;;
    *) echo "$*" >> "$STEP.requeued" ;;
esac
"""
RECIPE = """
[data]
clean_fraction = 1.0
allow_budget = true
[optim]
epochs = 500
batch_size = 30
[run]
checkpoint_every = 1000
"""


def printed(*arguments: object) -> str:
    """What ``mimic-fast slurm`` prints."""
    words = ["slurm", *map(str, arguments)]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


class Job:
    """The job script on one node with two processes, as often as it is queued."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.step = folder, folder / "step.json"
        tools = folder / "bin"
        tools.mkdir()
        for name, text in (("srun", f"#!{sys.executable}\n{SRUN}"), ("scontrol", SCONTROL)):
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("SLURM_")},
            "PATH": f"{tools}:{os.environ['PATH']}",
            "SLURM_JOB_ID": str(os.getpid()),  # decides the port
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_NTASKS": "2",
            "SLURM_NTASKS_PER_NODE": "2",
            "SLURM_CPUS_PER_TASK": "1",
            "STEP": str(self.step),
        }

    def start(self, script: str) -> subprocess.Popen[str]:
        self.step.unlink(missing_ok=True)
        path = self.folder / "job.sbatch"
        path.write_text(script)
        return subprocess.Popen(
            # As slurmd does: what the test runner ignores no shell of a job could trap.
            ["env", "--default-signal", "bash", path],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def signal(self, number: signal.Signals) -> None:
        """As Slurm does: every process of every task, wrappers included."""
        for pid in json.loads(self.step.read_text()):
            os.killpg(pid, number)

    @property
    def requeued(self) -> list[str]:
        path = Path(f"{self.step}.requeued")
        return path.read_text().splitlines() if path.exists() else []


def finished(job: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        output, _ = job.communicate(timeout=120)
    finally:
        job.kill()
    return job.returncode, output


def wait_for_steps(run: Path, count: int, job: subprocess.Popen[str]) -> None:
    """Returns while the job trains, ``count`` steps done."""
    end = time.monotonic() + 100
    while job.poll() is None and time.monotonic() < end:
        metrics = run / "metrics.jsonl"
        if metrics.exists() and metrics.read_text().count("\n") >= count:
            return
        time.sleep(0.005)
    pytest.fail(f"no training seen: {finished(job)}")


def test_job_saves_requeues_and_ends_where_it_stopped(tmp_path, teacher, labeled):
    folder = tmp_path / "with blanks"
    folder.mkdir()
    (folder / "my recipe.toml").write_text(RECIPE)
    job, run_directory = Job(folder), folder / "the run"
    script = printed(
        *(folder / "my recipe.toml", "--nodes", 1, "--gpus", 0, "--tasks", 2),
        *("--teacher", teacher, "--data", labeled / "train", "--out", "the run"),
        *("--python", sys.executable, "--cpus", 1, "--set", "run.max_steps=3000"),
    )

    running = job.start(script)
    wait_for_steps(run_directory, 3, running)
    job.signal(signal.SIGUSR1)
    code, output = finished(running)

    assert code == 6, output
    assert job.requeued == [f"requeue incomplete {os.getpid()}"]
    assert "2 process(es) on cpu" in output
    (state,) = (run_directory / "state").glob("step_*")
    reached = int(state.name.removeprefix("step_"))
    assert 3 <= reached < 3000

    # scancel: the same signal to all, SIGTERM, and to the script too. Saved, but not queued again.
    running = job.start(script)
    wait_for_steps(run_directory, reached + 1, running)
    running.send_signal(signal.SIGTERM)
    job.signal(signal.SIGTERM)
    code, output = finished(running)

    assert code == 6, output
    assert len(job.requeued) == 1, output
    assert max(path.name for path in (run_directory / "state").glob("step_*")) > state.name


def test_job_that_is_let_alone_purifies(tmp_path, teacher, labeled):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    job = Job(tmp_path)
    script = printed(
        *(tmp_path / "recipe.toml", "--nodes", 1, "--gpus", 0, "--tasks", 2),
        *("--teacher", teacher, "--data", labeled / "train", "--out", "run", "--cpus", 1),
        *("--python", sys.executable, "--set", "run.max_steps=4"),
    )

    code, output = finished(job.start(script))

    assert code == 0, output
    assert (tmp_path / "run" / "report.json").is_file()
    assert job.requeued == []


WORKER = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
assert os.environ["WORLD_SIZE"] == os.environ["LOCAL_WORLD_SIZE"] == "2"
assert os.environ["LOCAL_RANK"] == os.environ["RANK"]
assert os.environ["MASTER_ADDR"] == "localhost" and os.environ["OMP_NUM_THREADS"] == "1"
assert 10000 <= int(os.environ["MASTER_PORT"]) < 30000
if rank == int(os.environ["SLOW"]):
    time.sleep(20)  # still leaving, and no longer catching signals
code = int(os.environ["CODE"])
os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)
"""


@pytest.mark.parametrize(
    ("code", "answer", "requeues"),
    [(6, 6, 1), (2, 2, 0), (-signal.SIGKILL, 128 + signal.SIGKILL, 0)],
    ids=["stopped", "mistake", "killed"],
)
@pytest.mark.parametrize("slow", [0, 1])
def test_first_code_counts_though_the_other_process_is_ended(
    tmp_path, monkeypatch, code, answer, requeues, slow
):
    monkeypatch.chdir(ROOT)
    worker = tmp_path / "worker"
    worker.write_text(f"#!{sys.executable}\n{WORKER}")
    worker.chmod(0o755)
    job = Job(tmp_path)
    job.environment |= {"CODE": str(code), "SLOW": str(slow)}

    script = printed(
        *("launch/recipes/cifar10_small.toml", "--nodes", 1, "--gpus", 2, "--python", worker),
        *("--teacher", "suspect.safetensors", "--data", "images", "--out", "run"),
    )

    got, output = finished(job.start(script))

    assert got == answer, output
    assert len(job.requeued) == requeues
