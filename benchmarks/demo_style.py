"""The loop a researcher would write after the authors' demo: the baseline of bench_e2e.py.

Written from a description of a step of github.com/wssun/MIMIC (36ef47c), not from its code:

* feature maps come from running the stages once more: three student and two teacher forwards;
* the teacher's parameters require gradients, and the clone loss flows back into them;
* the attention loss is the mean over positions, the contrastive loss NT-Xent on two views;
* augmentation image by image with torchvision transforms on PIL images; contiguous NCHW; Adam.

Nothing in it is slow on purpose. ResNets of timm only.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

_STAGES = ("layer1", "layer2", "layer3", "layer4")


class TwoViews(Dataset[tuple[Tensor, Tensor]]):
    """Two augmented, normalized views of every image.

    Args:
        images: RGB, uint8.
        image_size: Height and width of the views, pixels.
        mean: Per channel, images in [0, 1].
        std: Per channel, images in [0, 1].
    """

    def __init__(
        self,
        images: UInt8[Tensor, "image 3 side side"],
        *,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.images = images.permute(0, 2, 3, 1).contiguous().numpy()
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(image_size, scale=(0.08, 1.0)),
                transforms.RandomHorizontalFlip(p=0.5),
                transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                transforms.RandomGrayscale(p=0.2),
                transforms.ToTensor(),
                transforms.Normalize(list(mean), list(std)),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = Image.fromarray(self.images[index])
        # A composition that ends in a tensor is typed as if it returned an image.
        return cast(Tensor, self.transform(image)), cast(Tensor, self.transform(image))


class StudentModel(nn.Module):
    """Backbone and projection head."""

    def __init__(self, backbone: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection = projection

    def forward(
        self, images: Float[Tensor, "batch channel height width"]
    ) -> tuple[Float[Tensor, "batch feature"], Float[Tensor, "batch width"]]:
        """Features and their projections."""
        features = self.backbone(images)
        return features, self.projection(features)


class DemoLosses(NamedTuple):
    """Terms of one step; ``attention`` is weighted by layer."""

    total: Tensor
    clone: Tensor
    attention: Tensor
    contrastive: Tensor


def stage_maps(
    backbone: nn.Module, images: Float[Tensor, "batch channel height width"]
) -> list[Float[Tensor, "batch map_channel map_height map_width"]]:
    """Outputs of the four stages of a timm ResNet, by running it module by module."""
    x = images
    for name in ("conv1", "bn1", "act1", "maxpool"):
        x = backbone.get_submodule(name)(x)
    maps: list[Tensor] = []
    for name in _STAGES:
        x = backbone.get_submodule(name)(x)
        maps.append(x)
    return maps


def attention(
    feature_map: Float[Tensor, "batch channel height width"],
) -> Float[Tensor, "batch position"]:
    """Where a layer looks: squared activations added over channels, divided by their norm."""
    powers = feature_map.abs().pow(2).sum(dim=1).flatten(start_dim=1)
    return powers / (torch.norm(powers, dim=1, keepdim=True) + 1e-6)


def nt_xent(
    first: Float[Tensor, "batch width"], second: Float[Tensor, "batch width"], temperature: float
) -> Float[Tensor, ""]:
    """Each projection must find the other view of its image among the 2B - 1 others."""
    batch = first.shape[0]
    out = F.normalize(torch.cat([first, second]), dim=1)
    similarity = torch.exp(out @ out.T / temperature)
    others = similarity.masked_fill(torch.eye(2 * batch, dtype=torch.bool), 0).sum(dim=1)
    partner = torch.arange(2 * batch).roll(batch)
    positive = similarity[torch.arange(2 * batch), partner]
    return -torch.log(positive / others).mean()


def demo_losses(
    student: StudentModel,
    teacher: nn.Module,
    view_1: Float[Tensor, "batch channel height width"],
    view_2: Float[Tensor, "batch channel height width"],
    layer_weights: Sequence[float],
    temperature: float,
) -> DemoLosses:
    """Losses of one batch of normalized views."""
    features, projected_1 = student(view_1)
    _, projected_2 = student(view_2)
    contrastive = nt_xent(projected_1, projected_2, temperature)

    teacher_features = teacher(view_1)
    clone = -F.cosine_similarity(features, teacher_features, dim=1).mean()

    student_maps = stage_maps(student.backbone, view_1)
    teacher_maps = stage_maps(teacher, view_1)
    weighted = torch.zeros((), dtype=features.dtype)
    for weight, own, target in zip(layer_weights, student_maps, teacher_maps, strict=True):
        weighted = weighted + weight * F.mse_loss(attention(own), attention(target).detach())

    return DemoLosses(contrastive + weighted + clone, clone, weighted, contrastive)


def demo_style_steps(
    student: StudentModel,
    teacher: nn.Module,
    dataset: Dataset[tuple[Tensor, Tensor]],
    layer_weights: Sequence[float],
    *,
    batch_size: int,
    epochs: int,
    seed: int,
    lr: float = 1e-3,
    weight_decay: float = 1e-6,
    temperature: float = 0.5,
) -> Iterator[float]:
    """Trains the student in place; yields the loss after every step.

    Args:
        student: Randomly initialized.
        teacher: Backbone of the suspect encoder; gathers gradients that nobody uses.
        dataset: Pairs of views; loaded in this process, so that the caller's clock sees it all.
        layer_weights: lambda_l of the four stages.
        batch_size: Images per step; the remainder of an epoch is dropped.
        epochs: Passes over the data.
        seed: Of the order and the augmentation; sets torch's global generator.
        lr: Learning rate, constant.
        weight_decay: L2 penalty.
        temperature: Of NT-Xent.
    """
    torch.manual_seed(seed)
    loader = DataLoader(dataset, batch_size=batch_size, shuffle=True, drop_last=True)
    optimizer = torch.optim.Adam(student.parameters(), lr=lr, weight_decay=weight_decay)
    student.train()
    teacher.eval()
    for _ in range(epochs):
        for view_1, view_2 in loader:
            losses = demo_losses(student, teacher, view_1, view_2, layer_weights, temperature)
            optimizer.zero_grad()
            losses.total.backward()
            optimizer.step()
            yield losses.total.item()
