import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from mimic_fast.data.order import check_batch, epoch_order, step_items, steps_of
from mimic_fast.distributed import SINGLE, Processes
from mimic_fast.errors import UsageError

IMAGES = st.integers(1, 300)
SEEDS = st.integers(0, 2**31 - 1)


def ranks(world: int) -> list[Processes]:
    return [Processes(rank=r, world=world, device=torch.device("cpu")) for r in range(world)]


def run(images: int, *, batch_size: int, passes: int, processes: Processes) -> list[Tensor]:
    """Ids and passes of every step, ``[2, B]``."""
    return [
        torch.stack(
            step_items(step, images=images, batch_size=batch_size, seed=3, processes=processes)
        )
        for step in range(steps_of(passes, images, batch_size=batch_size))
    ]


@given(images=IMAGES, seed=SEEDS, epoch=st.integers(0, 1000))
def test_epoch_order_is_a_permutation_that_comes_again(images, seed, epoch):
    order = epoch_order(images, seed=seed, epoch=epoch)

    assert order.sort()[0].tolist() == list(range(images))
    assert torch.equal(order, epoch_order(images, seed=seed, epoch=epoch))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = torch.stack(
        [epoch_order(500, seed=seed, epoch=epoch) for seed in range(4) for epoch in range(5)]
    )

    assert len(orders.unique(dim=0)) == 20
    # Of two independent orders about one item stands at the same place.
    same = (orders[:, None] == orders[None]).sum(2).fill_diagonal_(0)
    assert same.max() <= 8


def test_every_item_comes_to_every_place():
    orders = torch.stack([epoch_order(8, seed=0, epoch=epoch) for epoch in range(4000)])

    for place in orders.T:
        counts = torch.bincount(place, minlength=8)
        assert (counts - 500).abs().max() < 4 * (4000 * 7 / 64) ** 0.5


@given(
    images=IMAGES,
    share=st.integers(1, 20),
    world=st.sampled_from([1, 2, 4]),
    step=st.integers(0, 10**6),
)
def test_shares_of_all_processes_make_the_batch_of_one(images, share, world, step):
    batch_size = 4 * share  # the same global batch for 1, 2 and 4
    assume(images >= batch_size)

    def items(processes: Processes) -> Tensor:
        found = step_items(step, images=images, batch_size=batch_size, seed=5, processes=processes)
        return torch.stack(found)

    shares = [items(processes) for processes in ranks(world)]
    assert {part.shape[1] for part in shares} == {batch_size // world}
    assert torch.equal(torch.cat(shares, dim=1), items(SINGLE))


@given(images=IMAGES, batch_size=st.integers(1, 300), passes=st.integers(1, 4))
def test_every_pass_takes_every_item_once(images, batch_size, passes):
    assume(images >= batch_size)

    steps = run(images, batch_size=batch_size, passes=passes, processes=SINGLE)

    assert all(step.shape == (2, batch_size) for step in steps)
    ids, epochs = torch.cat(steps, dim=1)
    assert epochs.tolist() == sorted(epochs.tolist())
    for epoch in range(passes):
        assert ids[epochs == epoch].tolist() == epoch_order(images, seed=3, epoch=epoch).tolist()
    # Only what fills the last batch belongs to the pass after the last.
    rest = ids[epochs == passes]
    assert len(rest) == len(ids) - passes * images < batch_size
    assert epochs.max() <= passes


def test_a_batch_may_end_in_the_next_pass():
    ids, epochs = step_items(1, images=10, batch_size=8, seed=0, processes=SINGLE)

    assert epochs.tolist() == [0] * 2 + [1] * 6
    assert ids[:2].tolist() == epoch_order(10, seed=0, epoch=0)[8:].tolist()
    assert ids[2:].tolist() == epoch_order(10, seed=0, epoch=1)[:6].tolist()


@pytest.mark.parametrize(
    ("batch_size", "world", "better"), [(10, 4, 8), (7, 2, 6), (3, 4, 4), (5, 3, 3)]
)
def test_batch_that_cannot_be_shared_is_refused_with_one_that_can(batch_size, world, better):
    with pytest.raises(UsageError) as caught:
        check_batch(100, batch_size=batch_size, processes=ranks(world)[0])

    assert str(caught.value) == (
        f"optim.batch_size {batch_size} does not divide by {world} processes; use {better}"
    )


@pytest.mark.parametrize("images", [0, 1, 31])
def test_batch_larger_than_the_clean_set_is_refused(images):
    with pytest.raises(UsageError, match=f"batch_size 32 exceeds the {images} training images"):
        check_batch(images, batch_size=32, processes=SINGLE)


@pytest.mark.parametrize(("passes", "steps"), [(1, 4), (2, 7), (8, 25), (9, 29)])
def test_steps_complete_the_passes(passes, steps):
    assert steps_of(passes, 25, batch_size=8) == steps
