"""Batches in parts are whole batches: the same losses and gradients, whatever is random."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mimic_fast.accumulation import pulled, split
from mimic_fast.config import EncoderSpec, LossSettings, Settings
from mimic_fast.data.loader import Batch, TrainingImages
from mimic_fast.distributed import SINGLE, start
from mimic_fast.encoders.build import build_encoder
from mimic_fast.encoders.taps import TappedEncoder, default_taps
from mimic_fast.errors import UsageError
from mimic_fast.losses import contrastive_loss
from mimic_fast.step import Student
from mimic_fast.training import Task, train

BATCH = 8
TERMS = ("loss", "clone", "attention", "contrastive", "grad_norm")
NORMALIZED: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
RESNET = EncoderSpec(
    architecture="timm:resnet18",
    arguments={"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64]},
    stem="small_stride2",
    image_size=32,
    **NORMALIZED,
)
DROPPED = {
    "none": {},
    "drop_rate": {"drop_rate": 0.3},
    "proj_drop_rate": {"proj_drop_rate": 0.3},
    "attn_drop_rate": {"attn_drop_rate": 0.3},
    "drop_path_rate": {"drop_path_rate": 0.5},
    "all": {"drop_rate": 0.2, "proj_drop_rate": 0.2, "drop_path_rate": 0.3},
}


def vit(**dropped: float) -> EncoderSpec:
    shape = {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
    return EncoderSpec(
        architecture="timm:vit_tiny_patch16_224",
        arguments={**shape, **dropped},
        image_size=32,
        **NORMALIZED,
    )


def student_of(spec: EncoderSpec) -> Student:
    encoder = build_encoder(spec, seed=1)
    return Student(TappedEncoder(encoder, default_taps(encoder)), projection=16, seed=1)


@pytest.fixture(scope="module")
def pool() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (20, 3, 32, 32), generator=generator, dtype=torch.uint8)


def trained(
    pool: Tensor,
    precision: str,
    parts: int,
    *,
    dropped: str = "none",
    world: int = 1,
    **options: Any,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Logged terms and gradients of one step."""
    optim = {"batch_size": BATCH, "clip_norm": 0, "precision": precision, "accumulate": parts}
    run = Settings.model_validate(
        {
            "optim": {**optim, **options.pop("optim", {})},
            "loss": {"contrastive": 0.5, "dense": 0.1, **options.pop("loss", {})},
            "run": {"device": "cpu", "max_steps": 1},
        }
    )
    loss = run.loss.contrastive > 0
    student = student_of(vit(**DROPPED[dropped]))
    teacher = build_encoder(vit(), seed=7).requires_grad_(False)
    taps = student.tapped.taps
    task = Task(
        student=student,
        teacher=TappedEncoder(teacher, taps).eval(),
        layer_weights=(1000.0, 2000.0, 3000.0),
        images=TrainingImages(squares=pool),
    )
    gradients: dict[str, Tensor] = {}

    def keep(*_: Any) -> None:
        gradients.update(
            {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
        )

    logged: list[dict[str, float]] = []
    accelerator, processes = start(run.run, run.optim, expected_world=world)
    hook = register_optimizer_step_pre_hook(keep)
    try:
        train(
            task,
            settings=run,
            accelerator=accelerator,
            processes=processes,
            report=lambda event: logged.append(dict(event.metrics)),
        )
    finally:
        hook.remove()
    # Without a second view, no loss looks at the projections.
    used = [n for n, _ in student.named_parameters() if loss or not n.startswith("projection.")]
    assert sorted(gradients) == sorted(used)
    return {term: logged[0][term] for term in TERMS}, gradients


# float32's atol is 1e-6 of the largest gradient: their norm is 2 to 3 here.
EXACT: dict[str, dict[str, Any]] = {
    "fp64": {"rtol": 1e-12, "atol": 1e-12},
    "fp32": {"rtol": 1e-6, "atol": 3e-6},
}


@pytest.fixture(scope="module")
def whole(pool) -> dict[str, Any]:
    """Of a batch in one part."""
    return {precision: trained(pool, precision, 1) for precision in EXACT}


@pytest.mark.parametrize("parts", [2, 4, BATCH])
@pytest.mark.parametrize("precision", EXACT)
def test_parts_have_losses_and_gradients_of_the_whole(pool, whole, precision, parts):
    terms, gradients = trained(pool, precision, parts)

    expected_terms, expected = whole[precision]
    assert all(abs(value) > 0.01 for value in expected_terms.values())
    for term, value in expected_terms.items():
        assert terms[term] == pytest.approx(value, rel=EXACT[precision]["rtol"]), term
    torch.testing.assert_close(gradients, expected, **EXACT[precision])
    assert max(float(value.abs().max()) for value in expected.values()) > 0.1


def test_parts_of_losses_without_a_second_view_add_up(pool):
    loss = {"contrastive": 0.0}
    (terms, gradients), (expected_terms, expected) = (
        trained(pool, "fp64", parts, loss=loss) for parts in (4, 1)
    )

    assert terms["contrastive"] == 0
    assert terms == pytest.approx(expected_terms, rel=1e-12)
    torch.testing.assert_close(gradients, expected, **EXACT["fp64"])


def test_checkpointed_blocks_change_nothing_of_it(pool, whole):
    terms, gradients = trained(pool, "fp64", 2, optim={"activation_checkpointing": True})

    expected_terms, expected = whole["fp64"]
    assert terms == pytest.approx(expected_terms, rel=1e-12)
    torch.testing.assert_close(gradients, expected, **EXACT["fp64"])


def of_two_processes(pool: Tensor, parts: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    return trained(pool, "fp64", parts, world=2)


def test_parts_of_two_processes_have_losses_and_gradients_of_the_whole(run_processes, pool, whole):
    found = run_processes(of_two_processes, pool=pool, parts=2)

    expected_terms, expected = whole["fp64"]
    for terms, gradients in found:
        assert terms == pytest.approx(expected_terms, rel=1e-9)  # the bar for processes against one
        torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-9)


def test_contrastive_loss_of_parts_alone_would_be_another(pool, whole):
    # Or the tests above prove nothing.
    terms, _ = whole["fp64"]
    alone, _ = trained(pool, "fp64", 1, optim={"batch_size": BATCH // 2})

    assert abs(alone["contrastive"] - terms["contrastive"]) > 0.3


def test_a_batch_that_does_not_divide_is_refused(pool):
    with pytest.raises(UsageError, match=r"8 images.*optim.accumulate 3 parts; choose a divisor"):
        trained(pool, "fp32", 3)


def a_batch(dtype: torch.dtype = torch.float64) -> tuple[Batch, Tensor]:
    """What the student sees of the first view is not what the teacher sees."""
    generator = torch.Generator().manual_seed(3)
    first, second, own = torch.rand(3, BATCH, 3, 32, 32, generator=generator, dtype=dtype)
    return Batch(v1=first, v2=second, ids=torch.arange(BATCH) + 10), own


def test_parts_are_slices_in_order():
    batch, own = a_batch()
    batch = Batch(v1=batch.v1, v2=batch.v2, ids=batch.ids, plain=own, student=own)

    parts = split(batch, own, 4)

    assert len(parts) == 4
    assert torch.equal(torch.cat([part.student_view for part in parts]), own)
    assert torch.equal(torch.cat([part.batch.v1 for part in parts]), batch.v1)
    assert torch.equal(torch.cat([part.batch.ids for part in parts]), batch.ids)
    seconds = [part.batch.v2 for part in parts]
    assert batch.v2 is not None
    assert torch.equal(torch.cat([view for view in seconds if view is not None]), batch.v2)
    assert all(part.pull is None for part in parts)
    assert split(Batch(v1=own, v2=None, ids=batch.ids), own, 2)[1].batch.v2 is None


class Heard:
    """Keeps what the student projects, in the order of its forward passes."""

    def __init__(self, student: Student) -> None:
        self.projections: list[Tensor] = []
        student.register_forward_hook(lambda _, inputs, output: self.projections.append(output[1]))


def second_pass(student: nn.Module, parts: list[Any]) -> None:
    """As the loop pulls the parts, with the contrastive loss alone."""
    for part in parts:
        _, projected = student(torch.cat([part.student_view, part.batch.v2]))
        one, other = projected.split(len(part.student_view))
        loss = (one * part.pull[0]).sum() + (other * part.pull[1]).sum()
        (loss / len(parts)).backward()


@pytest.mark.parametrize("dropped", [name for name in DROPPED if name != "none"])
@pytest.mark.parametrize("parts", [2, 4])
def test_cached_pass_draws_the_same_numbers_as_the_second(dropped, parts):
    batch, own = a_batch()
    student = student_of(vit(**DROPPED[dropped])).double().train()
    cut = split(batch, own, parts)

    # One pass that keeps all graphs and takes the loss of the whole batch.
    torch.manual_seed(5)
    seconds = [part.batch.v2 for part in cut]
    views = [
        student(torch.cat([part.student_view, second]))[1].chunk(2)
        for part, second in zip(cut, seconds, strict=True)
        if second is not None
    ]
    first, second = (torch.cat([pair[n] for pair in views]) for n in range(2))
    value = contrastive_loss(first, second, temperature=0.5, processes=SINGLE)
    value.backward()
    expected = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    drawn = torch.rand(3)
    student.zero_grad(set_to_none=True)

    heard = Heard(student)
    torch.manual_seed(5)
    found, pulled_parts = pulled(student, cut, loss=LossSettings(), processes=SINGLE)
    second_pass(student, pulled_parts)

    assert len(heard.projections) == 2 * parts
    for cached, live in zip(heard.projections[:parts], heard.projections[parts:], strict=True):
        assert torch.equal(cached, live)
        assert not cached.requires_grad
        assert live.requires_grad
    torch.testing.assert_close(found, value.detach(), rtol=1e-12, atol=1e-12)
    gradients = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(torch.rand(3), drawn)  # the generator stands where one pass leaves it
    # And it is random: another seed projects elsewhere.
    torch.manual_seed(6)
    assert not torch.equal(student(torch.cat([own, own]))[1], student(torch.cat([own, own]))[1])


def test_first_pass_leaves_buffers_weights_and_generators_alone():
    batch, own = a_batch(torch.float32)
    student = student_of(RESNET).train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    generator = torch.get_rng_state()

    _, parts = pulled(student, split(batch, own, 2), loss=LossSettings(), processes=SINGLE)

    after = student.state_dict()
    assert any(name.endswith("num_batches_tracked") for name in before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.grad is None for parameter in student.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.pull is not None and p.pull[0].shape == (BATCH // 2, 16) for p in parts)
    student(own)
    assert not all(torch.equal(after[name], before[name]) for name in before)


def test_pulls_are_wide_under_autocast():
    batch, own = a_batch(torch.float32)
    student = student_of(vit()).train()
    student.autocast = torch.bfloat16

    value, parts = pulled(student, split(batch, own, 2), loss=LossSettings(), processes=SINGLE)

    assert value.dtype == torch.float32
    assert {g.dtype for p in parts for g in p.pull or ()} == {torch.float32}


def test_logged_terms_are_of_the_whole_batch(pool):
    # total = clone + attention + dense + weight * contrastive, also in parts.
    terms, _ = trained(pool, "fp64", 4, loss={"dense": 0.0, "contrastive": 0.7})

    total = terms["clone"] + terms["attention"] + 0.7 * terms["contrastive"]
    assert terms["loss"] == pytest.approx(total, rel=1e-12)
