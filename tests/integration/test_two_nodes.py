"""Two torchrun agents, each in a network of its own: a process killed on either comes back."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.survival import (
    OWN_STORE,
    Launch,
    ends_like,
    launching,
    logged,
    write_recipe,
)

STEPS, EVERY = 40, 3
NETWORK = "10.77.0."


def ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True, timeout=20)


@pytest.fixture
def nodes() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between them; gone with the test."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2's ip")
    names = f"mimic{os.getpid()}a", f"mimic{os.getpid()}b"
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
            ip(
                *("link", "add", "cable", "netns", names[0], "type", "veth"),
                *("peer", "name", "cable", "netns", names[1]),
            )
            for number, name in enumerate(names, start=1):
                ip("-n", name, "address", "add", f"{NETWORK}{number}/24", "dev", "cable")
                ip("-n", name, "link", "set", "cable", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        yield names
    finally:
        for name in names:  # the cable goes with the first of them
            with contextlib.suppress(subprocess.SubprocessError):
                ip("netns", "delete", name, check=False)


def agent(number: int, port: int) -> tuple[str, ...]:
    return (
        *("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint={NETWORK}1:{port}"),
        *("--rdzv-id=two_nodes", f"--local-addr={NETWORK}{number}"),
        *("--rdzv-conf", f"is_host={str(number == 1).lower()}"),
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def kill_while_training(launches: list[Launch], victim: int, run: Path, more: int) -> None:
    """Kills a node's process once the run has trained ``more`` steps, and waits for new ones."""
    before = [launch.pid(0) for launch in launches]
    rows = len(logged(run)) + more
    launches[victim].wait_for(lambda: len(logged(run)) >= rows)
    launches[victim].send(signal.SIGKILL, 0)
    for launch, old in zip(launches, before, strict=True):
        launch.wait_for(lambda launch=launch, old=old: launch.pid(0) != old)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_process_killed_on_either_node_comes_back(tmp_path, teacher, images, nodes):
    recipe = tmp_path / "recipe.toml"
    write_recipe(recipe, teacher=teacher, images=images, steps=STEPS, every=EVERY)
    straight, run, port = tmp_path / "straight", tmp_path / "run", free_port()
    dice = random.Random(3)
    with launching(tmp_path) as launcher:
        done = launcher.finish("purify", recipe, "--out", straight)
        assert done.code == 0, done.output
        launches = [
            launcher(
                *("purify", recipe, "--out", run, "--resume", "auto"),
                world=1,
                restarts=3,
                before=("ip", "netns", "exec", name),
                agent=agent(number, port),
                environment=OWN_STORE | {"GLOO_SOCKET_IFNAME": "cable"},
            )
            for number, name in enumerate(nodes, start=1)
        ]
        for victim in (1, 0):
            kill_while_training(launches, victim, run, dice.randint(2, 6))
        ends = [launch.end() for launch in launches]

    for done in ends:
        assert done.code == 0, done.output
    ends_like(run, straight)
