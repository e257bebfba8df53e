"""Writes frames as image files or tar shards into a folder that appears whole or not at all."""

import errno
import io
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from mimic_fast.data.video_settings import FrameSettings
from mimic_fast.errors import UsageError
from mimic_fast.files import fsync_directory, machine_errors

JPEG_QUALITY = 95

# Takes a file name and its bytes, returns the name of the shard they went into, if any.
AddFrame = Callable[[str, bytes], str | None]


def check_vacant(out: Path) -> None:
    """Refuses a folder that is taken.

    Raises:
        UsageError: If ``out`` is a file or a folder that is not empty.
    """
    try:
        taken = any(out.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"{out} cannot be used as a folder: {error.strerror}") from None
    if taken:
        raise _taken(out)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Gives a hidden sibling of ``out`` to write into, which takes its name when the block ends.

    If the block raises, nothing is left; if the process is killed, only the sibling is.

    Raises:
        UsageError: If ``out`` holds something by then.
        MachineError: If it cannot be written.
    """
    with machine_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            yield folder
            folder.chmod(0o755)
            fsync_directory(folder)
            _rename(folder, out)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        fsync_directory(out.parent)


@contextmanager
def frame_writer(folder: Path, settings: FrameSettings) -> Iterator[AddFrame]:
    """Gives the function that adds a frame to a folder, to files or to shards as set."""
    if settings.shard_frames is None:
        yield lambda name, data: write_synced(folder / name, data)
        return
    shards = _Shards(folder, settings.shard_frames)
    try:
        yield shards.add
    finally:
        shards.close()


def write_synced(path: Path, data: bytes) -> None:
    """Writes a new file and waits until it is on disk."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def encode_frame(image: Image.Image, file_format: str) -> bytes:
    """The bytes of the image file."""
    buffer = io.BytesIO()
    if file_format == "png":
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def _rename(folder: Path, out: Path) -> None:
    try:
        folder.rename(out)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise _taken(out) from None


def _taken(out: Path) -> UsageError:
    return UsageError(f"{out} holds files; give a new or an empty folder")


class _Shards:
    """Tar shards ``frames-000000.tar``, ... with a fixed number of frames each."""

    def __init__(self, folder: Path, frames: int) -> None:
        self.folder, self.frames = folder, frames
        self.count = 0
        self.tar: tarfile.TarFile | None = None

    def add(self, name: str, data: bytes) -> str:
        shard = f"frames-{self.count // self.frames:06d}.tar"
        if self.count % self.frames == 0:
            self.close()
            self.file = (self.folder / shard).open("xb")
            self.tar = tarfile.TarFile(fileobj=self.file, mode="w")
        assert self.tar is not None
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self.tar.addfile(member, io.BytesIO(data))
        self.count += 1
        return shard

    def close(self) -> None:
        if self.tar is None:
            return
        self.tar.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.tar = None
