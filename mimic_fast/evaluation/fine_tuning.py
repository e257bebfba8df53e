"""Fine-tuning as a downstream user does it: the encoder itself and a linear head, on few labels.

What a purification removed may come back when the encoder is trained on, and what it left may go:
accuracy and ASR of the fine-tuned network tell. The head starts as the linear probe (Kumar et al.,
ICLR 2022, arXiv:2202.10054), so what differs from that probe's row is due to fine-tuning alone.
SGD with momentum 0.9 and decay 5e-4, cosine, crops and flips.
"""

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Int64, UInt8
from torch import Tensor, nn

from mimic_fast.config import DataSettings, EvaluationSettings, OptimSettings
from mimic_fast.data.augment import augmented_view
from mimic_fast.data.images import load_images
from mimic_fast.data.items import Source
from mimic_fast.data.order import epoch_order
from mimic_fast.encoders.build import Encoder
from mimic_fast.errors import DivergedError
from mimic_fast.evaluation.downstream import DownstreamSet, Split, draw_stratified
from mimic_fast.evaluation.features import encode
from mimic_fast.evaluation.probes import fit_linear_probe
from mimic_fast.optim import build_optimizer, learning_rate, set_learning_rate
from mimic_fast.progress import Event, Reporter, silent
from mimic_fast.watch import leave_if

_BATCH = 64  # at most; fewer where a pass would have fewer than ten steps
_MILD = DataSettings(crop_scale=(0.6, 1.0), jitter_probability=0.0, grayscale=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class FineTuned:
    """A fine-tuned network; it can be encoded with like any encoder.

    Args:
        encoder: Images in [0, 1] to logits ``[B, num_classes]``.
        train_images: Labeled images behind it.
        sha256: Empty: it lies in no file.
    """

    encoder: Encoder
    train_images: int
    sha256: str = ""


def fine_tuned(
    encoder: Encoder,
    data: DownstreamSet,
    settings: EvaluationSettings,
    *,
    seed: int,
    report: Reporter = silent,
    stop: Callable[[], bool] = lambda: False,
) -> FineTuned:
    """Fine-tunes a copy of the encoder on ``fine_tune_share`` of the set's labeled images.

    Of all of them: ``probe_labels`` is for classifiers on frozen features.

    Every encoder gets the same images, order and crops.

    Raises:
        UsageError: If a label is out of range.
        UnsafeInputError: If no image can be read, or features are not finite.
        DivergedError: If the loss was not finite.
        StoppedError: If ``stop`` told so, polled every step.
    """
    spec = encoder.spec
    split = _share(data.train.source, settings.fine_tune_share, seed=seed, name=data.name)
    images, kept = load_images(
        split.source, split.indices.tolist(), image_size=spec.image_size, channels=spec.in_channels
    )
    labels = split.labels[torch.isin(split.indices, torch.tensor(kept))]
    device = next(encoder.parameters()).device
    network = copy.deepcopy(encoder).float().requires_grad_(True)
    margin = (images.shape[-1] - spec.image_size) // 2
    seen = images[..., margin : margin + spec.image_size, margin : margin + spec.image_size]
    probe = fit_linear_probe(
        encode(network, seen, stop=stop),
        labels,
        num_classes=data.num_classes,
        l2=settings.probe_l2,
        stop=stop,
    )
    head = nn.Linear(len(probe.mean), data.num_classes)
    weight = probe.weight / probe.scale
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(probe.bias - weight @ probe.mean)
    whole = nn.Sequential(network.backbone, head)
    classifier = Encoder(spec, whole, feature_dim=data.num_classes).to(device)
    _train(classifier, images, labels, settings, seed=seed, report=report, stop=stop)
    return FineTuned(encoder=classifier.eval().requires_grad_(False), train_images=len(images))


def _train(
    classifier: Encoder,
    images: UInt8[Tensor, "image channel side side"],
    labels: Int64[Tensor, "_image"],
    settings: EvaluationSettings,
    *,
    seed: int,
    report: Reporter,
    stop: Callable[[], bool],
) -> None:
    optim = OptimSettings(
        name="sgd",
        lr=settings.fine_tune_lr,
        weight_decay=5e-4,
        epochs=settings.fine_tune_epochs,
        warmup_epochs=0,
        batch_size=min(_BATCH, max(8, len(images) // 10), len(images)),
    )
    device = next(classifier.parameters()).device
    optimizer = build_optimizer(classifier, optim)
    per_epoch = len(images) // optim.batch_size  # what is left of a pass is left out
    total = per_epoch * optim.epochs
    classifier.train()
    for step in range(total):
        leave_if(stop)
        epoch, index = divmod(step, per_epoch)
        order = epoch_order(len(images), seed=seed, epoch=epoch)
        rows = order[index * optim.batch_size : (index + 1) * optim.batch_size]
        views = augmented_view(
            images[rows],
            rows,
            settings=_MILD,
            image_size=classifier.spec.image_size,
            seed=seed,
            epoch=epoch,
            view=1,
        )
        rate = learning_rate(
            step, total_steps=total, steps_per_epoch=float(per_epoch), settings=optim
        )
        set_learning_rate(optimizer, rate)
        optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss = F.cross_entropy(classifier(views.to(device)), labels[rows].to(device))
            loss.backward()
        optimizer.step()
        if index + 1 == per_epoch:
            if not bool(loss.isfinite()):
                raise DivergedError("fine-tuning diverged; lower evaluation.fine_tune_lr")
            report(Event(phase="fine_tune", done=step + 1, total=total, unit="steps"))


def _share(source: Source, share: float, *, seed: int, name: str) -> Split:
    """The same part of all labeled images for every encoder, every class in proportion."""
    assert source.labels is not None  # open_downstream saw to it
    labels = torch.tensor(source.labels, dtype=torch.int64)
    digest = hashlib.sha256(f"{seed}/{name}/fine_tune".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    count = max(2, round(len(labels) * share))
    rows = draw_stratified(labels, count, generator=generator)
    return Split(source=source, indices=rows, labels=labels[rows])
