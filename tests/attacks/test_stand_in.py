"""The adaptive attacker's student: it learns from the teacher, and the unrolled step is right."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mimic_fast.attacks.stand_in import (
    clean_views,
    distil_once,
    heading,
    heading_after_step,
    new_stand_in,
)
from mimic_fast.config import DataSettings
from mimic_fast.encoders.ingest import load_encoder


def squares(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(count, 3, 16, 16, generator=generator) * 255).to(torch.uint8)


def test_distilling_brings_the_student_nearer(clean):
    teacher = load_encoder(clean).encoder
    stand_in = new_stand_in(teacher, squares(64), data=DataSettings(), lr=3e-3, seed=0)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}

    losses = [distil_once(stand_in, teacher, step=step, batch_size=16) for step in range(30)]

    assert sum(losses[-5:]) < sum(losses[:5]) - 0.5
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert stand_in.student.training


def test_views_depend_on_the_step_alone(clean):
    teacher = load_encoder(clean).encoder
    stand_in = new_stand_in(teacher, squares(32), data=DataSettings(), lr=3e-3, seed=0)

    first = clean_views(stand_in, step=7, count=8)
    distil_once(stand_in, teacher, step=0, batch_size=8)

    assert torch.equal(clean_views(stand_in, step=7, count=8), first)
    assert not torch.equal(clean_views(stand_in, step=8, count=8), first)


def test_heading_is_seen_from_the_plain_images():
    plain = torch.tensor([[1.0, 0.0], [3.0, 0.0]])  # mean (2, 0)
    reference = torch.tensor([[2.0, 5.0]])

    assert heading(torch.tensor([[2.0, 1.0], [2.0, 3.0]]), plain, reference).item() == 1
    assert heading(torch.tensor([[9.0, 0.0]]), plain, reference).item() == 0
    # All images the same, as near to the reference as can be: no way from plain to triggered.
    collapsed = reference.expand(2, 2)
    assert heading(collapsed, collapsed, reference).item() == 0


def test_unrolled_step_is_a_step_of_gradient_descent_with_a_gradient_of_its_own(clean):
    generator = torch.Generator().manual_seed(1)
    student = load_encoder(clean).encoder.double().train()
    shape = (4, 4, 3, 16, 16)
    views, triggered, plain, references = torch.rand(
        shape, generator=generator, dtype=torch.float64
    )
    answers = torch.randn(4, 64, generator=generator, dtype=torch.float64).requires_grad_()
    before = {name: value.clone() for name, value in student.state_dict().items()}

    def by_hand(answers: Tensor) -> Tensor:
        copy = load_encoder(clean).encoder.double().eval()
        (-F.cosine_similarity(copy(views), answers).mean()).backward()
        with torch.no_grad():
            for parameter in copy.parameters():
                assert parameter.grad is not None
                parameter -= 0.3 * parameter.grad
            center = copy(plain).mean(0)
            way = copy(references).mean(0) - center
            return F.cosine_similarity(copy(triggered) - center, way[None]).mean()

    found = heading_after_step(
        student,
        answers,
        views=views,
        triggered=triggered,
        plain=plain,
        references=references,
        lr=0.3,
    )
    found.backward()

    torch.testing.assert_close(found.detach(), by_hand(answers.detach()))
    assert answers.grad is not None
    direction = torch.randn(answers.shape, generator=generator, dtype=torch.float64)
    small = 1e-5 * direction
    slope = (by_hand(answers.detach() + small) - by_hand(answers.detach() - small)) / 2e-5
    torch.testing.assert_close((answers.grad * direction).sum(), slope, rtol=1e-4, atol=1e-8)
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    assert student.training
