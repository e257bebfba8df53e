import gc

import numpy as np
import pytest
import torch
from scipy.fft import dctn

from mimic_fast.errors import StoppedError
from mimic_fast.scan.concentration import clean_center
from mimic_fast.scan.probing import answers, patch_probes, spectral_probes, strongest


@pytest.mark.parametrize(("size", "channels"), [(16, 1), (16, 3), (33, 3)])
def test_patches_lie_inside_and_have_names_of_their_own(size, channels):
    probes = list(patch_probes(image_size=size, channels=channels, seed=0))

    names = {probe.name for probe in probes}
    assert len(names) == len(probes)
    for probe in probes:
        assert probe.mask.shape == (1, size, size)
        assert probe.pattern.shape == (channels, size, size)
        assert bool(((probe.pattern >= 0) & (probe.pattern <= 1)).all())
        assert float((probe.pattern * (1 - probe.mask)).abs().max()) == 0
    covered = torch.stack([probe.mask for probe in probes]).amax(0)
    assert bool((covered == 1).all())


def test_patches_depend_on_the_seed_alone():
    first, again, other = (
        [p.pattern for p in patch_probes(image_size=16, channels=3, seed=seed)]
        for seed in (1, 1, 2)
    )

    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("channels", [1, 3])
def test_spectral_probes_are_single_frequencies_of_one_strength(channels):
    for probe in spectral_probes(image_size=32, channels=channels):
        assert float(probe.pattern.square().mean().sqrt()) == pytest.approx(12 / 255, rel=1e-5)
        for plane in probe.pattern.double().numpy():
            spectrum = np.abs(np.asarray(dctn(plane, norm="ortho")))
            row, column = np.unravel_index(spectrum.argmax(), spectrum.shape)
            assert spectrum.max() < 1e-9 or f"({row}, {column})" in probe.name
            assert np.sort(spectrum.ravel())[-2] < 1e-4 * max(spectrum.max(), 1e-3)


def test_spectral_probes_tile_larger_images():
    small = next(iter(spectral_probes(image_size=32, channels=3))).pattern
    large = next(iter(spectral_probes(image_size=80, channels=3))).pattern

    assert torch.allclose(large[:, 32:64, :32] / large[0, 0, 0], small / small[0, 0, 0])


def test_probes_hold_no_images_until_they_are_built():
    probes = [
        *patch_probes(image_size=96, channels=3, seed=0),
        *spectral_probes(image_size=96, channels=3),
    ]

    assert len(probes) == 2 * 36 * 7 + 2 * 49 * 3
    tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor]
    assert not [x.shape for x in tensors if x.shape[-2:] == (96, 96)]
    assert probes[0].pattern.shape == (3, 96, 96)


def test_the_planted_patch_is_the_strongest_probe(planted, clean, pixels):
    probes = list(patch_probes(image_size=16, channels=3, seed=0))
    found = {}
    for name, encoder in (("planted", planted), ("clean", clean)):
        center = clean_center(encoder, pixels, batch_size=32)
        found[name] = strongest(answers(encoder, pixels, center, probes), "patch")

    assert found["planted"].probe.name == "white 4x4 at row 10, column 12"
    assert found["planted"].concentration > 0.9
    assert found["clean"].concentration < found["planted"].concentration - 0.2


def test_batches_make_no_difference_and_a_signal_leaves(clean, pixels):
    probes = list(patch_probes(image_size=16, channels=3, seed=0))[:5]
    center = clean_center(clean, pixels, batch_size=32)

    whole, parts = (
        [a.concentration for a in answers(clean, pixels, center, probes, batch_size=size)]
        for size in (96, 7)
    )

    assert whole == pytest.approx(parts, abs=1e-6)
    with pytest.raises(StoppedError):
        answers(clean, pixels, center, probes, stop=lambda: True)
