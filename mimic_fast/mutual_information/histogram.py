"""Equal-mass bins, their joint counts, and the nats in them.

Counts are integers and the exact chance level is known for any margins, so nothing here is averaged
over batches: the plug-in estimate of one table from all images is what carries the information.
"""

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from mimic_fast.errors import SelfTestError

AUTO_BINS = (4, 8, 12, 16, 24, 32)
LARGEST_BIAS = 0.125  # nats per pair, (K - 1)^2 / (2 n): a sparser table is noise


def choose_bins(requested: int | str, images: int, *, force: bool) -> int:
    """Bins per axis, K.

    Args:
        requested: A K, or 'auto' for the largest of ``AUTO_BINS`` within ``LARGEST_BIAS``.
        images: Images in one histogram (half the clean set under cross-fitting).
        force: Permit tables that are too sparse.

    Raises:
        SelfTestError: If the table would be too sparse for the number of images.
    """
    fitting = [bins for bins in AUTO_BINS if plug_in_bias(bins, images) <= LARGEST_BIAS]
    if requested == "auto":
        if not fitting and not force:
            raise SelfTestError(
                f"mutual information needs {2 * _images_needed(AUTO_BINS[0])} clean images, got "
                f"about {2 * images}; draw more, or set mi.force"
            )
        return max(fitting, default=AUTO_BINS[0])
    bins = int(requested)
    if plug_in_bias(bins, images) > LARGEST_BIAS and not force:
        raise SelfTestError(
            f"mi.bins = {bins} needs {2 * _images_needed(bins)} clean images, got about "
            f"{2 * images}; use mi.bins = 'auto' or more images, or set mi.force"
        )
    return bins


def plug_in_bias(bins: int, images: int) -> float:
    """Leading bias of the plug-in estimate of independent variables, nats."""
    return (bins - 1) ** 2 / (2 * max(1, images))


def margin_entropy(margin: Int[Tensor, "*table bins"]) -> Float64[Tensor, "*table"]:
    """Entropy of one axis, nats: the most a pair can show; log K for equal-mass bins."""
    images = margin.sum(dim=-1).clamp(min=1).double()
    return images.log() - _c_log_c(margin).sum(dim=-1) / images


def chance_information(
    x_margin: Int[Tensor, "pair bins"], y_margin: Int[Tensor, "pair bins"]
) -> Float64[Tensor, " pair"]:
    """Mean plug-in information over all shuffled pairings with these margins, exact, nats.

    Under a random pairing a cell with margins a and b holds a hypergeometric number of images, so
    the mean of f(n_xy) is a short sum (Vinh, Epps and Bailey, JMLR 11, 2010, "expected mutual
    information"). It is the limit of infinitely many shuffles, without their noise, and right for
    ties too.
    """
    pairs, bins = x_margin.shape
    images = x_margin.sum(dim=1)
    totals, total = torch.unique(images, return_inverse=True)
    base = max(totals.tolist(), default=0) + 1
    # One integer for each cell's total and margins: sorting rows of three takes ten times as long.
    rows_and_totals = total[:, None] * base + x_margin.long()
    cells = rows_and_totals[:, :, None] * base + y_margin.long()[:, None, :]
    distinct, which = torch.unique(cells.reshape(-1), return_inverse=True)
    triples = [
        (int(totals[cell // base**2]), cell // base % base, cell % base)
        for cell in distinct.tolist()
    ]
    means = torch.tensor([_mean_cell(*triple) for triple in triples], dtype=torch.float64)
    expected = means[which].view(pairs, bins * bins).sum(dim=1)
    rows = _c_log_c(x_margin).sum(dim=1)
    columns = _c_log_c(y_margin).sum(dim=1)
    count = images.clamp(min=1).double()
    return count.log() + (expected - rows - columns) / count


def _mean_cell(images: int, a: int, b: int) -> float:
    low, high = max(0, a + b - images), min(a, b)
    held = torch.arange(low, high + 1, dtype=torch.float64)
    log_chance = _log_choose(a, held) + _log_choose(images - a, b - held) - _log_choose(images, b)
    return float((log_chance.exp() * torch.special.xlogy(held, held)).sum())


def _log_choose(n: int, k: Tensor | int) -> Tensor:
    chosen = torch.as_tensor(k, dtype=torch.float64)
    total = torch.tensor(float(n + 1), dtype=torch.float64)
    return total.lgamma() - (chosen + 1).lgamma() - (n - chosen + 1).lgamma()


def _c_log_c(counts: Int[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
    wide = counts.double()
    return torch.special.xlogy(wide, wide)


def _images_needed(bins: int) -> int:
    return -int(-((bins - 1) ** 2) // (2 * LARGEST_BIAS))
