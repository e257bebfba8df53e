"""Ten passes over either backend leave the process as large as two did.

As a script this file makes the passes and prints the resident memory after each.
"""

import ctypes
import gc
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

COUNT, BATCH, PASSES = 48, 12, 10


def main(folder: str, backend: str, decode: str) -> None:
    """Prints MiB of resident memory after every pass."""
    from mimic_fast.config import EncoderSpec, Settings
    from mimic_fast.data.clean_set import clean_images
    from mimic_fast.data.loader import Loader, TrainingImages
    from mimic_fast.distributed import SINGLE

    settings = Settings.model_validate(
        {
            "data": {
                "source": folder,
                "clean_count": COUNT,
                "allow_budget": True,
                "backend": backend,
                "decode": decode,
            },
            "optim": {"batch_size": BATCH},
            "loss": {"contrastive": 1.0, "harden": {"probability": 0.5}},
        }
    )
    spec = EncoderSpec(
        architecture="timm:resnet18", image_size=128, mean=(0.5,) * 3, std=(0.25,) * 3
    )
    found = clean_images(settings.data, spec, seed=0)
    images = TrainingImages(squares=found.squares, files=found.files)
    loader = Loader(images, settings=settings, image_size=128, processes=SINGLE)
    with loader.batches(0, PASSES * COUNT // BATCH) as batches:
        for step, batch in enumerate(batches, start=1):
            assert len(batch.ids) == BATCH
            if step % (COUNT // BATCH) == 0:
                sys.stdout.write(f"{resident()}\n")


def settle() -> None:
    """Waits until no thread of this process has worked for a while."""
    idle = 0
    while idle < 3:
        before = time.process_time()
        time.sleep(0.1)
        idle = idle + 1 if time.process_time() - before < 0.002 else 0


def resident() -> float:
    settle()  # until the batches made ahead are ready: the same number every time
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free, but kept, is not growth
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(
    ("backend", "decode"), [("torch", "once"), ("torch", "every_time"), ("dali", "auto")]
)
def test_memory_stays_after_the_second_pass(tmp_path, backend, decode):
    if backend == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    generator = np.random.default_rng(0)
    for index in range(COUNT):
        pixels = generator.integers(0, 256, (240 + index, 320, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.jpg", quality=90)

    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path), backend, decode],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-2000:]
    after = [float(line) for line in done.stdout.split()]
    assert len(after) == PASSES
    assert after[-1] < 1.01 * after[1], after


if __name__ == "__main__":
    main(*sys.argv[1:])
