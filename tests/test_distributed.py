import contextlib
import copy
import os
import signal
import threading
import time
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mimic_fast import distributed, ops
from mimic_fast.batchnorm import synchronize_batchnorm
from mimic_fast.config import LossSettings, OptimSettings, RunSettings
from mimic_fast.distributed import SINGLE, Processes, StopSignal, start
from mimic_fast.errors import UsageError
from mimic_fast.losses import contrastive_loss, total_loss, weighted_attention_loss

WORLD = 2
BATCH = 6  # images of the joined batch, half of them on each process
STEPS = 3
EXACT: dict[str, Any] = {
    "rtol": 1e-9,
    "atol": 1e-9,
}  # the project's bar for processes against one, in float64
LOSS = LossSettings(clone=1.0, attention_weight=1.0, contrastive=0.7)


def randn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# A purification in small: every term that gathers, and normalization over the joined batch.


class SmallStudent(nn.Module):
    """Features, one feature map and projections, as the training's student returns them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.projection = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        feature_map = self.stem(images)
        features = self.body(feature_map).mean((2, 3))
        return features, feature_map, self.projection(features)


def small_student() -> SmallStudent:
    torch.manual_seed(0)
    return SmallStudent().double()


def train_steps(student: nn.Module, wrapped: nn.Module, processes: Processes) -> dict[str, Any]:
    """Three steps of SGD on this process's share of fixed batches."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    share = BATCH // processes.world
    rows = slice(processes.rank * share, (processes.rank + 1) * share)
    losses, gradients = [], []
    for step in range(STEPS):
        images = [randn(BATCH, 3, 8, 8, seed=100 * step + k)[rows] for k in range(2)]
        target, target_map = (randn(BATCH, 8, seed=step), randn(BATCH, 4, 6, 6, seed=step))
        features, maps, projected = wrapped(torch.cat(images))
        terms = total_loss(
            clone=ops.clone_loss(features[:share], target[rows]),
            attention=weighted_attention_loss(
                [maps[:share]], [target_map[rows]], [30.0], settings=LOSS
            ),
            contrastive=contrastive_loss(
                projected[:share], projected[share:], temperature=0.5, processes=processes
            ),
            settings=LOSS,
        )
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        losses.append(torch.stack([terms.total, terms.clone, terms.attention, terms.contrastive]))
        gradients.append({name: p.grad.clone() for name, p in student.named_parameters()})  # pyright: ignore
    return {
        "losses": torch.stack(losses).detach(),
        "gradients": gradients,
        "state": {name: value.detach() for name, value in student.state_dict().items()},
    }


# What the ranks bring: keyed by name, one tensor per rank, first dimensions may differ.

ROWS: dict[str, tuple[Tensor, Tensor]] = {
    "equal": (randn(3, 4, seed=0), randn(3, 4, seed=1)),
    "unequal": (randn(1, 4, seed=0), randn(5, 4, seed=1)),
    "first-empty": (randn(0, 2, 3, seed=0), randn(2, 2, 3, seed=1)),
    "last-empty": (randn(2, 7, seed=0), randn(0, 7, seed=1)),
    "all-empty": (randn(0, 7, seed=0), randn(0, 7, seed=1)),
    "vector": (torch.arange(3), torch.arange(10, 12)),
    "bytes": (torch.tensor([[1, 255]]).to(torch.uint8), torch.tensor([[7, 0]]).to(torch.uint8)),
    "flags": (torch.tensor([True, False]), torch.tensor([True])),
    "half": (randn(2, 3, seed=0).half(), randn(1, 3, seed=1).half()),
    "bfloat16": (randn(2, 3, seed=0).bfloat16(), randn(1, 3, seed=1).bfloat16()),
    "transposed": (randn(4, 2, seed=0).T, randn(4, 3, seed=1).T),
}
SENT = [
    randn(2, 3, seed=0),
    torch.tensor(7),
    torch.empty(0, 4),
    torch.tensor([[True], [False]]),
    randn(3, 2, seed=1).T,
    torch.arange(5, dtype=torch.int32),
    torch.tensor([3], dtype=torch.uint8),
    randn(2, seed=2).bfloat16(),
]
COUNTS = (torch.tensor([[1, 2**40], [0, -3]]), torch.tensor([[5, 2**40], [0, 1]]))
PLAIN = {"taps": ["layer1", "layer2"], "seed": 3, "share": 0.25, "none": None}


def gather_with_gradient(processes: Processes) -> dict[str, Tensor]:
    rows = randn(3, 4, seed=processes.rank).requires_grad_()
    gathered = distributed.gather_with_gradient(rows, processes)
    gathered.backward(randn(6, 4, seed=10 + processes.rank))
    assert rows.grad is not None
    return {"value": gathered.detach(), "gradient": rows.grad}


def sum_with_gradient(processes: Processes) -> dict[str, Tensor]:
    part = randn(3, seed=processes.rank).requires_grad_()
    total = distributed.sum_with_gradient(part, processes)
    total.backward(randn(3, seed=10 + processes.rank))
    assert part.grad is not None
    return {"value": total.detach(), "gradient": part.grad}


def refusals(world: int) -> list[str]:
    """What ``start`` says to wishes that cannot come true any more."""
    messages = []
    for engine, expected in (("ddp", world + 1), ("zero2", world)):
        try:
            run = RunSettings.model_validate({"device": "cpu", "engine": engine})
            start(run, OptimSettings(precision="fp64"), expected_world=expected)
        except UsageError as error:
            messages.append(str(error))
    return messages


def waited_seconds(processes: Processes) -> float:
    distributed.wait_for_all(processes)
    began = time.monotonic()
    if processes.rank == 1:
        time.sleep(0.5)
    distributed.wait_for_all(processes)
    return time.monotonic() - began


def worker() -> dict[str, Any]:
    optim = OptimSettings(precision="fp64")
    accelerator, processes = start(RunSettings(device="cpu"), optim, expected_world=WORLD)
    rank = processes.rank
    student = small_student()
    synchronize_batchnorm(student, processes)
    tracked = randn(2, 3, seed=0).requires_grad_()
    count = COUNTS[rank].clone()
    with StopSignal() as stop:
        none_yet = distributed.any_process(stop(), processes)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        all_stop = distributed.any_process(stop(), processes)
        own_stop = stop()
    return {
        "running": [rank, processes.world, processes.device.type, dist.get_backend()],
        "precision": accelerator.mixed_precision,
        "is_main": processes.is_main,
        "refusals": refusals(WORLD),
        "trained": train_steps(student, accelerator.prepare_model(student), processes),
        "gathered": gather_with_gradient(processes),
        "summed": sum_with_gradient(processes),
        "rows": {k: distributed.all_gather_rows(v[rank], processes) for k, v in ROWS.items()},
        "rows_track": distributed.all_gather_rows(tracked, processes).requires_grad,
        "sent": distributed.broadcast_tensors(SENT if rank == 0 else [], processes),
        "none_sent": distributed.broadcast_tensors([], processes),
        "counts": distributed.sum_counts(count, processes),
        "counts_kept": torch.equal(count, COUNTS[rank]),
        "plain": distributed.broadcast_json(PLAIN if rank == 0 else None, processes),
        "stops": [none_yet, all_stop, own_stop],
        "waited": waited_seconds(processes),
    }


def alone() -> dict[str, Any]:
    """One process that torchrun started."""
    accelerator, processes = start(
        RunSettings(device="cpu"), OptimSettings(precision="fp64"), expected_world=1
    )
    student = small_student()
    return {
        "running": [processes.rank, processes.world, processes.device.type],
        "refusals": refusals(1),
        "trained": train_steps(student, accelerator.prepare_model(student), processes),
    }


@pytest.fixture(scope="module")
def two_processes(run_processes) -> list[dict[str, Any]]:
    return run_processes(worker, world=WORLD)


@pytest.fixture(scope="module")
def one_process() -> dict[str, Any]:
    student = small_student()
    return train_steps(student, student, SINGLE)


def test_processes_know_who_they_are(two_processes):
    assert [r["running"] for r in two_processes] == [[0, 2, "cpu", "gloo"], [1, 2, "cpu", "gloo"]]
    assert [r["is_main"] for r in two_processes] == [True, False]
    assert [r["precision"] for r in two_processes] == ["no", "no"]


def test_a_run_that_differs_from_the_wish_is_refused(two_processes):
    for result in two_processes:
        count, engine = result["refusals"]
        assert count.startswith("the launcher started 3 processes but Accelerate runs 2")
        assert engine.startswith("run.engine 'zero2' keeps its weights in float32")
        assert "\n" not in count + engine


def test_losses_of_two_processes_average_to_those_of_one(two_processes, one_process):
    found = sum(result["trained"]["losses"] for result in two_processes) / WORLD

    torch.testing.assert_close(found, one_process["losses"], **EXACT)
    assert (one_process["losses"][:, 1:].abs() > 0.01).all()  # every term takes part


def test_gradients_of_two_processes_are_those_of_one(two_processes, one_process):
    for result in two_processes:
        for step in range(STEPS):
            found, expected = (r["gradients"][step] for r in (result["trained"], one_process))
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, **EXACT)
                assert value.abs().max() > 1e-4, name


def test_final_state_of_two_processes_is_that_of_one(two_processes, one_process):
    for result in two_processes:
        found = result["trained"]["state"]
        assert list(found) == list(one_process["state"])
        for name, value in one_process["state"].items():
            torch.testing.assert_close(found[name], value, **EXACT)


def test_gathered_rows_carry_the_gradients_of_every_process(two_processes):
    everything = torch.cat([randn(3, 4, seed=rank) for rank in range(WORLD)])
    gradients = randn(6, 4, seed=10) + randn(6, 4, seed=11)

    for rank, result in enumerate(two_processes):
        assert torch.equal(result["gathered"]["value"], everything)
        torch.testing.assert_close(
            result["gathered"]["gradient"], gradients[3 * rank : 3 * rank + 3], **EXACT
        )


def test_sum_carries_the_gradients_of_every_process(two_processes):
    for result in two_processes:
        expected = {"value": randn(3, seed=0) + randn(3, seed=1)}
        expected["gradient"] = randn(3, seed=10) + randn(3, seed=11)
        torch.testing.assert_close(result["summed"], expected, **EXACT)


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_joined_in_the_order_of_processes(name, two_processes):
    expected = torch.cat(ROWS[name])

    for result in two_processes:
        found = result["rows"][name]
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_plain_gathering_carries_no_gradient(two_processes):
    assert [result["rows_track"] for result in two_processes] == [False, False]


def test_broadcast_brings_the_tensors_of_the_first_process(two_processes):
    for result in two_processes:
        assert len(result["sent"]) == len(SENT)
        for found, expected in zip(result["sent"], SENT, strict=True):
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert torch.equal(found, expected)
        assert result["none_sent"] == []
        assert result["plain"] == PLAIN


def test_counts_are_added_exactly_and_the_input_is_kept(two_processes):
    for result in two_processes:
        assert torch.equal(result["counts"], torch.tensor([[6, 2**41], [0, -2]]))
        assert result["counts_kept"]


def test_a_signal_to_one_process_is_a_decision_of_all(two_processes):
    assert [result["stops"] for result in two_processes] == [
        [False, True, False],
        [False, True, True],
    ]


def test_all_wait_for_the_slowest(two_processes):
    assert min(result["waited"] for result in two_processes) > 0.4


def test_one_process_under_torchrun_is_a_run_like_any_other(run_processes, one_process):
    (result,) = run_processes(alone, world=1)

    assert result["running"] == [0, 1, "cpu"]
    assert result["refusals"][0].startswith("the launcher started 2 processes but Accelerate")
    for name, value in one_process["state"].items():
        torch.testing.assert_close(result["trained"]["state"][name], value, **EXACT)


# One process, in this very process.


def test_one_process_passes_everything_through():
    rows = randn(3, 2, seed=0)
    for collective in (
        distributed.all_gather_rows,
        distributed.gather_with_gradient,
        distributed.sum_with_gradient,
    ):
        assert collective(rows, SINGLE) is rows
    assert distributed.broadcast_tensors([rows], SINGLE)[0] is rows
    assert torch.equal(distributed.sum_counts(COUNTS[0], SINGLE), COUNTS[0])
    assert distributed.broadcast_json(PLAIN, SINGLE) is PLAIN
    assert [distributed.any_process(flag, SINGLE) for flag in (True, False)] == [True, False]
    distributed.wait_for_all(SINGLE)


def test_contrastive_loss_of_one_process_sees_only_its_own_batch(one_process):
    # The gathered loss must differ from the mean of the parts, or the tests above prove nothing.
    student = copy.deepcopy(small_student())
    images = [randn(BATCH, 3, 8, 8, seed=k) for k in range(2)]
    projected = F.normalize(student(torch.cat(images))[2], dim=1)
    halves = [
        contrastive_loss(
            projected[rows], projected[BATCH:][rows], temperature=0.5, processes=SINGLE
        )
        for rows in (slice(0, 3), slice(3, 6))
    ]

    whole = one_process["losses"][0, 3]
    assert (sum(halves) / 2 - whole).abs() > 0.1


def test_floating_counts_are_refused():
    with pytest.raises(TypeError, match="counts must be integers"):
        distributed.sum_counts(torch.ones(3), SINGLE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_missing_device_is_refused():
    with pytest.raises(UsageError, match=r"run.device is 'cuda' but no CUDA device is visible"):
        start(RunSettings(device="cuda"), OptimSettings(), expected_world=1)


def test_more_processes_than_run_are_refused():
    with pytest.raises(UsageError, match="the launcher started 2 processes but Accelerate runs 1"):
        start(RunSettings(device="cpu"), OptimSettings(), expected_world=2)


def test_device_that_accelerate_puts_in_place_of_the_wish_is_refused(monkeypatch):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # it reads its environment once
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    try:
        with pytest.raises(UsageError, match=r"run.device 'cpu' was asked for but meta runs"):
            start(RunSettings(device="cpu"), OptimSettings(), expected_world=1)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_is_what_the_settings_say(tf32):
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    ignored = pytest.warns(UserWarning, match=r"optim\.tf32 is ignored: a CPU has no TF32")
    try:
        with ignored if tf32 else contextlib.nullcontext():
            start(RunSettings(device="cpu"), OptimSettings(tf32=tf32), expected_world=1)
        found = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before

    assert found == (tf32, tf32)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_first_signal_is_remembered_and_named(number):
    with StopSignal() as stop:
        assert not stop()
        assert stop.name == ""
        os.kill(os.getpid(), number)

        assert stop()
        assert stop.name == signal.Signals(number).name


def test_second_interrupt_leaves_at_once():
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()

        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_repeated_termination_is_no_reason_to_hurry():
    # Schedulers send SIGTERM to the whole group, and torchrun passes it on once more.
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

        assert stop.name == "SIGTERM"


def test_handlers_are_put_back_even_after_an_error():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]

    inside = before
    with contextlib.suppress(ZeroDivisionError), StopSignal():
        inside = [signal.getsignal(number) for number in numbers]
        _ = 1 / 0

    assert all(own != old for own, old in zip(inside, before, strict=True))
    assert [signal.getsignal(number) for number in numbers] == before


def test_other_threads_run_without_signals_and_say_so():
    caught: list[Any] = []

    def run() -> None:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with StopSignal() as stop:
                caught.append(stop())
            caught.extend(str(warning.message) for warning in said)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()

    assert caught == [False, "signals are only caught in the main thread; this run cannot"]
