import pytest
import torch
from torch import Tensor, nn

from mimic_fast.errors import StoppedError, UnsafeInputError
from mimic_fast.scan.concentration import clean_center, concentration
from mimic_fast.scan.forms import ADDITIVE, PATCH, Form, from_probe, noise
from mimic_fast.scan.inversion import Schedule, Search, invert
from mimic_fast.scan.probing import patch_probes

CPU = torch.device("cpu")
STRONGEST = "white 4x4 at row 10, column 12"  # see test_probing
SCHEDULE = Schedule(levels=(0.9, 0.5), steps=80, batch_size=32, seed=0)
SHORT = Schedule(levels=(0.6, 0.3), steps=20, batch_size=32, seed=0)


def start(form: Form) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    if form is ADDITIVE:
        return noise(image_size=16, channels=3, generator=draw)
    probes = patch_probes(image_size=16, channels=3, seed=0)
    return from_probe(next(probe for probe in probes if probe.name == STRONGEST), draw)


def run(search: Search, encoder, pixels, **options):
    options = {"every": 1000, "save": lambda _: None, "tick": lambda *_: None} | options
    center = clean_center(encoder, pixels, batch_size=32)
    return invert(search, encoder, pixels, center, **options)


@pytest.mark.parametrize("form", [PATCH, ADDITIVE], ids=lambda form: form.name)
def test_a_planted_backdoor_needs_less_than_a_clean_encoder(planted, clean, pixels, form):
    small, large = (
        run(Search(form, start(form), SCHEDULE, CPU), encoder, pixels)
        for encoder in (planted, clean)
    )

    assert small[0].reached
    assert small[0].size < 0.6 * large[0].size
    assert small[1].size <= small[0].size


def test_the_recovered_patch_is_where_the_planted_one_is_and_works(planted, pixels):
    found = run(Search(PATCH, start(PATCH), SCHEDULE, CPU), planted, pixels)[0]

    inside = found.mask[0, -5:-1, -5:-1].sum()
    assert float(inside / found.mask.sum()) > 0.6
    center = clean_center(planted, pixels, batch_size=32)
    triggered = PATCH.stamp(pixels, found.mask, found.pattern)
    # the moving average over five batches decided, so that a single value may be a little below
    assert float(concentration(planted(triggered), center)) > 0.8


@pytest.mark.parametrize("form", [PATCH, ADDITIVE], ids=lambda form: form.name)
@pytest.mark.parametrize("at", [1, 13, 20, 39])
def test_interrupted_and_resumed_is_the_same_to_the_bit(planted, pixels, form, at):
    whole = run(Search(form, start(form), SHORT, CPU), planted, pixels)
    states: list[dict[str, Tensor]] = []
    search = Search(form, start(form), SHORT, CPU)
    with pytest.raises(StoppedError):
        run(search, planted, pixels, stop=lambda: search.step == at, save=states.append)

    again = Search(form, [torch.zeros_like(t) for t in start(form)], SHORT, CPU)
    again.restore({name: tensor.clone() for name, tensor in states[-1].items()})
    assert again.step == at
    resumed = run(again, planted, pixels)

    for one, other in zip(whole, resumed, strict=True):
        assert (one.size, one.reached) == (other.size, other.reached)
        assert torch.equal(one.mask, other.mask)
        assert torch.equal(one.pattern, other.pattern)


def test_state_is_saved_every_so_many_steps_and_at_the_end(clean, pixels):
    steps: list[int] = []
    schedule = Schedule(levels=(0.9,), steps=10, batch_size=8, seed=0)

    run(
        Search(ADDITIVE, start(ADDITIVE), schedule, CPU),
        clean,
        pixels,
        every=4,
        save=lambda state: steps.append(int(state["numbers"][0])),
    )

    assert steps == [4, 8, 10]


class Opaque(nn.Module):
    """Sends no two images to one place, whatever is added."""

    def __init__(self) -> None:
        super().__init__()
        self.signs = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        alternate = torch.ones(len(images), 1)
        alternate[::2] = -1
        return alternate * (1 + images.mean((2, 3))) * self.signs


def test_a_level_that_is_never_reached_is_said(wrapped, pixels):
    schedule = Schedule(levels=(0.9,), steps=10, batch_size=8, seed=0)

    (found,) = run(Search(ADDITIVE, start(ADDITIVE), schedule, CPU), wrapped(Opaque()), pixels)

    assert not found.reached
    assert found.size == ADDITIVE.largest


class Breaks(nn.Module):
    """Not a number on images of a batch's length, finite before."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        features = images.mean((2, 3)) * self.scale
        return features / 0 if len(images) == 8 else features


def test_features_that_are_not_finite_stop_the_search(wrapped, pixels):
    schedule = Schedule(levels=(0.9,), steps=10, batch_size=8, seed=0)

    with pytest.raises(UnsafeInputError, match="not finite"):
        run(Search(PATCH, start(PATCH), schedule, CPU), wrapped(Breaks()), pixels)
