"""Bytes of live storages: what is counted, when, and when it is let go."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mimic_fast.planning.live import LiveBytes


def test_storage_counts_until_it_is_let_go_and_views_are_free():
    live = LiveBytes()
    with live:
        first = torch.zeros(10)
        view = first[2:5].view(3, 1)
        assert live.now == 40
        second = first + 1
        assert live.now == 80
        del first
        assert live.now == 80  # the view holds it
        del view
        assert live.now == 40
    del second
    assert live.now == 0


def test_saved_tensors_count_until_backward_has_used_them():
    weight = torch.ones(4, requires_grad=True)
    live = LiveBytes()
    live.hold([weight])
    with live:
        loss = (weight.exp() * 2).sum()  # exp keeps its result, the product does not
        assert live.now == 16 + 16 + 4
        loss.backward()
        assert live.now == 16 + 4 + 16  # weight, loss, gradient


def test_gradients_are_told_from_the_rest():
    weight = torch.ones(4, requires_grad=True)
    live = LiveBytes()
    live.hold([weight])
    live.watch_gradients([weight])
    with live:
        live.start()
        weight.exp().sum().backward()
        _ = torch.zeros(1)  # after the gradient was stored
        during = live.trace().gradients[-1]
        weight.grad = None
        _ = torch.zeros(1)
        after = live.trace().gradients[-1]

    assert (during, after) == (16, 0)


def test_fake_tensors_have_the_bytes_that_real_ones_would_have():
    with FakeTensorMode():
        live = LiveBytes()
        with live:
            kept = torch.empty(2**40) + 1

    assert live.now == kept.numel() * 4
