"""What others do with the same files: Pillow and torchvision v2, torchvision's decoder, bare DALI.

Every candidate is an endless iterator of batches of float32 views in [0, 1], made by one thread in
this process. They draw their own random numbers, from the distributions of ``DataSettings``.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from mimic_fast.config import DataSettings

Mode = Literal["two views", "two crops", "one image"]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is asked for: the views of ``mode`` at ``size`` pixels, ``batch`` images at a time."""

    files: Sequence[bytes]
    shards: Sequence[str]
    size: int
    batch: int
    mode: Mode
    data: DataSettings


def transform(work: Work) -> Callable[[Any], list[Tensor]]:
    """Torchvision v2 on one decoded image (PIL or uint8 tensor)."""
    data, size = work.data, work.size
    to_float = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    if work.mode == "one image":
        margin = round(size * 8 / 7)
        steps = [v2.Resize(margin, antialias=True), v2.CenterCrop(size), *to_float]
        whole = v2.Compose(steps)
        return lambda image: [whole(image)]
    crop = v2.RandomResizedCrop(size, data.crop_scale, data.crop_ratio, antialias=True)
    steps = [crop, v2.RandomHorizontalFlip(data.flip)]
    if work.mode == "two views":
        steps += [
            v2.RandomApply([v2.ColorJitter(*data.jitter)], data.jitter_probability),
            v2.RandomGrayscale(data.grayscale),
        ]
    view = v2.Compose([*steps, *to_float])
    return lambda image: [view(image), view(image)]


class Files(Dataset[list[Tensor]]):
    """Decoded and transformed one by one, as most training programs do."""

    def __init__(self, work: Work, decode: Callable[[bytes], Any]) -> None:
        self.work, self.decode, self.transform = work, decode, transform(work)

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.transform(self.decode(self.work.files[index % len(self.work.files)]))


def pillow(work: Work) -> Iterator[list[Tensor]]:
    """Pillow decodes, torchvision v2 transforms, DataLoader in this process."""

    def decode(data: bytes) -> Image.Image:
        return Image.open(io.BytesIO(data)).convert("RGB")

    return iter(DataLoader(Files(work, decode), batch_size=work.batch))


def torchvision_decoder(work: Work) -> Iterator[list[Tensor]]:
    """The same with torchvision's decoder and uint8 tensors."""

    def decode(data: bytes) -> Tensor:
        return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)

    return iter(DataLoader(Files(work, decode), batch_size=work.batch))


def bare_dali(work: Work) -> Iterator[list[Tensor]]:
    """DALI alone, its own reader and random operators; outputs as they are, not copied."""
    from nvidia.dali import fn as dali_fn
    from nvidia.dali import types as dali_types
    from nvidia.dali.pipeline import Pipeline

    fn: Any = dali_fn  # generated: no checker knows what is in them
    types: Any = dali_types

    data, size = work.data, work.size
    low, high = data.crop_ratio

    def jittered(images: Any) -> Any:
        chosen = fn.random.coin_flip(probability=data.jitter_probability)

        def factor(strength: float) -> Any:
            return 1 + chosen * fn.random.uniform(range=[-strength, strength])

        gray = fn.random.coin_flip(probability=data.grayscale)
        return fn.color_twist(
            images,
            brightness=factor(data.jitter[0]),
            contrast=factor(data.jitter[1]),
            saturation=factor(data.jitter[2]) * (1 - gray),
            hue=chosen * fn.random.uniform(range=[-360 * data.jitter[3], 360 * data.jitter[3]]),
        )

    pipeline = Pipeline(batch_size=work.batch, num_threads=1, device_id=None, seed=1)
    with pipeline:
        encoded = fn.readers.webdataset(
            paths=list(work.shards),
            ext=["jpg"],
            random_shuffle=True,
            missing_component_behavior="error",
        )
        images = fn.decoders.image(encoded, output_type=types.RGB, adjust_orientation=False)
        views = []
        for _ in range(1 if work.mode == "one image" else 2):
            mirror: Any = 0
            if work.mode == "one image":
                view = fn.resize(images, resize_shorter=round(size * 8 / 7), antialias=True)
            else:
                mirror = fn.random.coin_flip(probability=data.flip)
                view = fn.random_resized_crop(
                    images,
                    size=[size, size],
                    random_area=list(data.crop_scale),
                    random_aspect_ratio=[low, high],
                    antialias=True,
                )
            if work.mode == "two views":
                view = jittered(view)
            view = fn.crop_mirror_normalize(
                view,
                crop=(size, size),
                mirror=mirror,
                dtype=types.FLOAT,
                mean=[0.0] * 3,
                std=[255.0] * 3,
                output_layout="CHW",
            )
            views.append(view)
        pipeline.set_outputs(*views)
    pipeline.build()
    for _ in count():
        yield [torch.from_numpy(np.asarray(output.as_tensor())) for output in pipeline.run()]
