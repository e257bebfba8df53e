"""What the doctor tries in processes of its own: a crash or a hang there is a finding.

Every function returns what it saw; what it raises is the finding's text.
"""

import importlib
import tempfile
from datetime import timedelta
from pathlib import Path

_SECONDS = 15  # that two processes wait for each other


def all_reduce(backend: str, store: str, rank: int) -> str:
    """Adds up a tensor over two processes that meet in the file ``store``.

    Raises:
        RuntimeError: If they do not meet, or the sum is wrong.
    """
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=_SECONDS),
        device_id=device if backend == "nccl" else None,
    )
    values = torch.full((1024,), rank + 1.0, device=device)
    dist.all_reduce(values)
    if not bool((values == 3).all()):
        raise RuntimeError(f"the sum of 1 and 2 over two processes is {values[0].item()}")
    dist.barrier()
    dist.destroy_process_group()
    return "two processes added up a tensor"


def deepspeed_version() -> str:
    """Imports DeepSpeed, which looks for a device and compilers while it does."""
    return f"deepspeed {importlib.import_module('deepspeed').__version__}"


def triton_runs() -> str:
    """Compiles the attention loss for the GPU and compares it with plain PyTorch.

    Raises:
        RuntimeError: If the two differ.
    """
    import torch

    from mimic_fast import ops

    maps = [torch.rand(4, 16, 8, 8, device="cuda") for _ in range(2)]
    with ops.force("triton"):
        fast = ops.attention_loss(maps[0], maps[1])
    with ops.force("reference"):
        slow = ops.attention_loss(maps[0], maps[1])
    if not torch.allclose(fast, slow, rtol=1e-3, atol=1e-6):
        raise RuntimeError(f"Triton's loss is {fast.item()}, PyTorch's {slow.item()}")
    return "the attention loss was compiled and agrees with plain PyTorch"


def dali_views(device: str) -> str:
    """Makes one batch of views from JPEG files, as a run with ``data.backend = 'dali'`` would."""
    import torch
    from PIL import Image

    from mimic_fast.config import EncoderSpec, Settings
    from mimic_fast.data.clean_set import clean_images
    from mimic_fast.data.loader import Loader, TrainingImages
    from mimic_fast.distributed import Processes

    spec = EncoderSpec(
        architecture="timm:resnet18", image_size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)
    )
    processes = Processes(rank=0, world=1, device=torch.device(device))
    with tempfile.TemporaryDirectory() as folder:
        for number in range(4):
            color = (60 * number, 30, 200)
            Image.new("RGB", (40, 36), color).save(Path(folder) / f"{number}.jpg")
        settings = Settings.model_validate(
            {
                "data": {
                    "source": folder,
                    "clean_count": 4,
                    "allow_budget": True,
                    "backend": "dali",
                    "cache": "memory",
                },
                "optim": {"batch_size": 2},
            }
        )
        images = clean_images(settings.data, spec, seed=0)
        training = TrainingImages(squares=images.squares, files=images.files)
        loader = Loader(training, settings=settings, image_size=32, processes=processes)
        with loader.batches(0, 1) as batches:
            batch = next(iter(batches))
    return f"made {len(batch.ids)} views on the {batch.v1.device.type.upper()}"


def data_opens(settings_json: str, world: int) -> str:
    """Opens the data source, decodes an image and counts what a run would draw.

    Raises:
        UsageError: If the source, the budget or the batch do not fit.
    """
    from mimic_fast.config import Settings
    from mimic_fast.data import clean_set
    from mimic_fast.data.order import check_batch
    from mimic_fast.data.sources import limits_of, open_source
    from mimic_fast.distributed import SINGLE, Processes

    settings = Settings.model_validate_json(settings_json)
    data = settings.data
    assert data.source is not None
    source = open_source(data.source, limits=limits_of(data))
    source.decode(source.read(0))
    if data.clean_set is None:
        drawn = clean_set.requested_count(source, data)
        size = data.pretraining_size or len(source)
        clean_set.check_budget(size, data, drawn, name=source.name)
    else:
        drawn = len(clean_set.read_clean_set(data.clean_set))
    training = drawn - round(data.hold_out * drawn)
    processes = Processes(rank=0, world=world, device=SINGLE.device)
    optim = settings.optim
    check_batch(training, batch_size=optim.batch_size, processes=processes, parts=optim.accumulate)
    return f"{len(source)} images in {source.name}, {drawn} drawn, {training} of them train"
