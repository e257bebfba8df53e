"""``mimic-fast slurm``: the script it prints, and what it refuses."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mimic_fast.errors import UsageError
from mimic_fast.launch.cli import app, run
from mimic_fast.launch.slurm_script import limit_seconds

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "launch" / "slurm" / "purify.sbatch"
# What is shipped: two nodes of eight GPUs for a recipe that is shipped too.
DEFAULT = (
    *("launch/recipes/cifar10_small.toml", "--nodes", "2", "--gpus", "8"),
    *("--teacher", "suspect.safetensors", "--data", "cifar10/train-*.tar"),
    *("--out", "runs/cifar_purified"),
)


def printed(*arguments: object) -> str:
    """What ``mimic-fast slurm`` prints."""
    words = ["slurm", *map(str, arguments)]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def directives(script: str) -> dict[str, str]:
    lines = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", script, re.MULTILINE)
    return dict(lines)


def words_of(script: str) -> list[str]:
    """The command as bash reads it: nothing of the script runs but the array."""
    array = script[script.index("purify=(") : script.index("\n)\n") + 3]
    shown = subprocess.run(
        ["bash", "-c", f"{array}printf '%s\\0' \"${{purify[@]}}\""],
        capture_output=True,
        text=True,
        check=True,
    )
    return shown.stdout.split("\0")[:-1]


def test_shipped_script_is_what_the_command_prints(monkeypatch):
    monkeypatch.chdir(ROOT)

    assert SHIPPED.read_text() == printed(*DEFAULT)


@pytest.mark.parametrize("tool", ["bash", "shellcheck"])
def test_shipped_script_is_sound_shell(tool):
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    checker = ["bash", "-n"] if tool == "bash" else ["shellcheck"]

    done = subprocess.run([*checker, SHIPPED], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr


def test_directives_say_what_was_asked(monkeypatch):
    monkeypatch.chdir(ROOT)

    script = printed(
        *DEFAULT,
        *("--time", "1-12:00:00", "--partition", "gpu,long", "--account", "vision@lab"),
        *("--cpus", "12", "--signal-before", "300"),
        *("--sbatch", "--qos=high", "--sbatch", "--exclusive"),
        *("--srun", "--container-image=/images/mimic fast.sqsh", "--env", "module load cuda"),
    )

    assert directives(script) == {
        "job-name": "mimic-fast",
        "nodes": "2",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "cpus-per-task": "12",
        "time": "1-12:00:00",
        "partition": "gpu,long",
        "account": "vision@lab",
        "qos": "high",
        "exclusive": "",
        "output": "%x-%j.out",
        "open-mode": "append",
        "requeue": "",
        "signal": "USR1@300",
    }
    # directives behind the first command would not be read
    assert script.rindex("#SBATCH") < script.index("module load cuda") < script.index("purify=(")
    assert "    '--container-image=/images/mimic fast.sqsh' \\\n" in script
    assert words_of(script)[-4:] == ["--device", "cuda", "--resume", "auto"]


def test_values_reach_the_program_as_they_are(tmp_path):
    evil = tmp_path / 'it\'s a $(touch injected)\n`touch injected`; "x" & # {{ job }}.toml'
    evil.write_text("")
    teacher, out = "a b/$HOME.pt", "run\n#SBATCH --nodes=99"

    script = printed(
        *(evil, "--nodes", 1, "--gpus", 0, "--tasks", 2, "--teacher", teacher, "--data", "c*"),
        *("--out", out, "--set", 'encoder.taps=["a b"]', "--python", "/opt/my env/bin/python"),
    )

    assert words_of(script) == [
        *("/opt/my env/bin/python", "-m", "mimic_fast", "purify", str(evil)),
        *("--teacher", teacher, "--data", "c*", "--out", out, "--set", 'encoder.taps=["a b"]'),
        *("--device", "cpu", "--resume", "auto"),
    ]
    before_the_command = script[: script.index("purify=(")]
    assert "99" not in before_the_command
    assert "injected" not in before_the_command
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--set", "optim.learning_rat=1"), "unknown setting"),
        (("--set", "optim.batch_size=100"), "must divide by 16"),
        (("--set", "optim.accumulate=3"), "must divide by 48: 16 processes"),
        (("--set", "run.resume='never'"), "run.resume auto"),
        (("--set", "run.device='cpu'"), "computes on 'cuda'"),
        (("--tasks", "4"), "one process per GPU"),
        (("--gpus", "0"), "--tasks"),
        (("--time", "2h"), "--time must be"),
        (("--time", "3"), "--time 3 leaves no time"),
        (("--partition", "gpu\n#SBATCH --nodes=99"), "--partition takes letters"),
        (("--account", "lab; rm -r ~"), "--account takes letters"),
        (("--sbatch", "--comment=two words"), "--sbatch takes one option"),
        (("--sbatch", "qos=high"), "--sbatch takes one option"),
        (("--srun", "label"), "--srun takes one option"),
        (("--env", "module load cuda\nrm x"), "--env takes one shell line"),
        (("--signal-before", "5"), "--signal-before"),
    ],
)
def test_mistakes_are_found_before_the_job_is_queued(monkeypatch, capsys, options, message):
    monkeypatch.chdir(ROOT)

    code = run(["slurm", *DEFAULT, *options])

    said = capsys.readouterr()
    assert (code, said.out) == (2, "")
    assert message in said.err


def test_what_the_recipe_leaves_open_is_named(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)

    assert run(["slurm", *DEFAULT[:5]]) == 2
    assert "leaves --teacher, --data, --out open" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("1:02:03", 3723),
        ("2-0", 172800),
        ("2-1:30", 178200),
        ("1-00:00:01", 86401),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(text, seconds):
    assert limit_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "1:2:3:4", "1-", "-5", "1:2:3\n", "٣", "4 h"])
def test_other_time_limits_are_refused(text):
    with pytest.raises(UsageError, match="--time"):
        limit_seconds(text)
