import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from mimic_fast.config import DataSettings
from mimic_fast.data.augment import augmented_view
from mimic_fast.data.loader import batch_ids, epoch_order, make_batch, steps_per_epoch
from mimic_fast.distributed import SINGLE, Processes
from mimic_fast.errors import UsageError

IMAGES = st.integers(1, 300)
SEEDS = st.integers(0, 2**31 - 1)


def ranks(world: int) -> list[Processes]:
    return [Processes(rank=r, world=world, device=torch.device("cpu")) for r in range(world)]


def images(count: int, *, channels: int = 3, side: int = 16) -> Tensor:
    shape = (count, channels, side, side)
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)


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


@given(images=IMAGES, share=st.integers(1, 20), world=st.sampled_from([1, 2, 4]), seed=SEEDS)
def test_shares_of_all_processes_make_the_batch_of_one(images, share, world, seed):
    batch_size = 4 * share  # the same global batch for 1, 2 and 4
    assume(images >= batch_size)
    order = epoch_order(images, seed=seed, epoch=3)

    for step in range(steps_per_epoch(images, batch_size=batch_size, processes=SINGLE)):
        shares = [
            batch_ids(order, batch_size=batch_size, step=step, processes=p) for p in ranks(world)
        ]
        whole = batch_ids(order, batch_size=batch_size, step=step, processes=SINGLE)
        assert {len(ids) for ids in shares} == {batch_size // world}
        assert torch.cat(shares).tolist() == whole.tolist()


@given(images=IMAGES, batch_size=st.integers(1, 300), seed=SEEDS)
def test_an_epoch_repeats_no_item_and_leaves_less_than_a_batch(images, batch_size, seed):
    assume(images >= batch_size)
    order = epoch_order(images, seed=seed, epoch=0)

    steps = steps_per_epoch(images, batch_size=batch_size, processes=SINGLE)

    seen: list[int] = []
    for step in range(steps):
        ids = batch_ids(order, batch_size=batch_size, step=step, processes=SINGLE).tolist()
        assert len(ids) == batch_size
        seen += ids
    assert len(set(seen)) == len(seen)
    assert 0 <= images - len(seen) < batch_size


def test_items_left_out_of_one_epoch_come_in_others():
    left = {int(epoch_order(9, seed=0, epoch=epoch)[8]) for epoch in range(200)}

    assert left == set(range(9))


@pytest.mark.parametrize(
    ("batch_size", "world", "better"), [(10, 4, 8), (7, 2, 6), (3, 4, 4), (5, 3, 3)]
)
def test_batch_that_cannot_be_shared_is_refused_with_one_that_can(batch_size, world, better):
    with pytest.raises(UsageError) as caught:
        steps_per_epoch(100, batch_size=batch_size, processes=ranks(world)[0])

    assert str(caught.value) == (
        f"optim.batch_size {batch_size} does not divide by {world} processes; use {better}"
    )


@pytest.mark.parametrize("images", [0, 1, 31])
def test_batch_larger_than_the_clean_set_is_refused(images):
    with pytest.raises(UsageError, match=f"batch_size 32 exceeds the {images} training images"):
        steps_per_epoch(images, batch_size=32, processes=SINGLE)


@pytest.mark.parametrize(("images", "steps"), [(32, 1), (63, 1), (64, 2), (65, 2)])
def test_only_full_batches_count(images, steps):
    for processes in (SINGLE, *ranks(4)):
        assert steps_per_epoch(images, batch_size=32, processes=processes) == steps


@pytest.mark.parametrize("channels", [1, 3])
def test_batch_holds_the_views_of_its_items(channels):
    pool, ids = images(10, channels=channels), torch.tensor([7, 2, 5])

    batch = make_batch(
        pool, ids, settings=DataSettings(), image_size=12, seed=3, epoch=4, second=True
    )

    for number, found in ((1, batch.v1), (2, batch.v2)):
        expected = augmented_view(
            pool[ids], ids, settings=DataSettings(), image_size=12, seed=3, epoch=4, view=number
        )
        assert found is not None
        assert torch.equal(found, expected)
    assert batch.v1.shape == (3, channels, 12, 12)
    assert not torch.equal(batch.v1, batch.v2)  # pyright: ignore[reportArgumentType]
    assert torch.equal(batch.ids, ids)


def test_second_view_is_made_only_where_it_is_needed():
    pool, ids = images(4), torch.arange(4)

    def batch(*, second: bool) -> tuple[Tensor, Tensor | None]:
        made = make_batch(
            pool, ids, settings=DataSettings(), image_size=16, seed=0, epoch=0, second=second
        )
        return made.v1, made.v2

    first, none = batch(second=False)
    assert none is None
    assert torch.equal(first, batch(second=True)[0])  # and the first does not change with it


def test_two_processes_see_the_images_of_one():
    pool, order = images(20), epoch_order(20, seed=0, epoch=1)

    def views(processes: Processes, step: int) -> Tensor:
        ids = batch_ids(order, batch_size=8, step=step, processes=processes)
        key = {"settings": DataSettings(), "image_size": 16, "seed": 0, "epoch": 1}
        return make_batch(pool, ids, second=False, **key).v1

    for step in range(2):
        shares = torch.cat([views(processes, step) for processes in ranks(2)])
        assert torch.equal(shares, views(SINGLE, step))
