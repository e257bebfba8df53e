"""The ways by which Fashion-MNIST reaches a machine: archives in a folder, a download, apt-get.

Each returns the decompressed files or raises :class:`FetchError` with a short reason. None prints,
asks for root, or touches the state of the system's package manager. The caller checks the digests.
"""

import queue
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.request
import zlib
from collections.abc import Sequence
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from mimic_fast.progress import Event, Reporter

DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")

_MAX_BYTES = 64 * 2**20  # the largest file has 47 MB
_ANSWER_SECONDS = 4.0
_DOWNLOAD_SECONDS = 300.0
_APT_SECONDS = 300.0

# Own state and cache. No hooks: after an update, some clean the system's cache or refresh its
# desktop catalog. No switch to the _apt user, who may not enter a home folder. Signatures are
# checked as ever.
_APT_CONFIG = """\
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear APT::Update::Post-Invoke-Stats;
Dir::State "{folder}";
Dir::State::lists "lists/";
Dir::State::status "{folder}/status";
Dir::Cache "{folder}";
Dir::Cache::archives "archives/";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
Dir::Log "{folder}";
Debug::NoLocking "true";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "1";
Acquire::http::Timeout "10";
Acquire::https::Timeout "10";
"""


class FetchError(Exception):
    """One way of fetching failed; the next one is tried."""


class RefusedError(FetchError):
    """One way gave files, but not those that it should: damaged, or somebody else's."""


def from_folder(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Decompresses ``NAME.gz`` of a folder.

    Raises:
        FetchError: If one is missing, unreadable or no gzip file.
    """
    try:
        return {name: _gunzip(_start(folder / f"{name}.gz"), name) for name in names}
    except OSError as error:
        raise FetchError(f"{error.filename}: {error.strerror}") from None


def from_mirrors(
    mirrors: Sequence[str] | None, names: Sequence[str], report: Reporter
) -> dict[str, bytes]:
    """Downloads ``NAME.gz`` from the first mirror that answers; None: torchvision's mirrors.

    Raises:
        FetchError: If no mirror answers within seconds or a download breaks off.
    """
    if mirrors is None:
        from torchvision.datasets import FashionMNIST

        mirrors = FashionMNIST.mirrors
    reason = "no mirror"
    for mirror in mirrors:
        try:
            return {
                name: _gunzip(_download(f"{mirror.rstrip('/')}/{name}.gz", report), name)
                for name in names
            }
        except FetchError as error:
            reason = str(error)
    raise FetchError(reason)


def from_apt(folder: Path, names: Sequence[str], report: Reporter) -> dict[str, bytes]:
    """Downloads the Debian package with apt-get and unpacks it, in a folder that is then removed.

    Raises:
        FetchError: If this is no Debian-like system or the package cannot be had.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise FetchError(f"{tool} is not installed")
    report(Event(phase="fetch", message=f"fetching {DEBIAN_PACKAGE} with apt-get (no root needed)"))
    with tempfile.TemporaryDirectory(prefix=".apt-", dir=folder) as name:
        work = Path(name)
        for part in ("lists/partial", "archives/partial", "unpacked"):
            (work / part).mkdir(parents=True)
        (work / "status").touch()
        (work / "apt.conf").write_text(_APT_CONFIG.format(folder=work), encoding="utf-8")
        apt = ["apt-get", "-c", "apt.conf", "-qq"]
        # A third party's repository may make it fail; what counts is that the package is found.
        _run([*apt, "update"], work)
        failure = _run([*apt, "download", DEBIAN_PACKAGE], work)
        package = next(work.glob("*.deb"), None)
        if failure or package is None:
            raise FetchError(failure or f"no package {DEBIAN_PACKAGE}")
        failure = _run(["dpkg-deb", "-x", package.name, "unpacked"], work)
        if failure:
            raise FetchError(failure)
        return from_folder(work / "unpacked" / DEBIAN_FOLDER.relative_to("/"), names)


def _run(command: list[str], folder: Path) -> str:
    """Runs a command without terminal; its failure in a few words, empty if it succeeded."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_APT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"{command[0]} took more than {_APT_SECONDS:.0f} s"
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    if done.returncode == 0:
        return ""
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"{command[0]} exited with {done.returncode}"


def _download(url: str, report: Reporter) -> bytes:
    deadline = time.monotonic() + _DOWNLOAD_SECONDS
    parts: list[bytes] = []
    done = 0
    try:
        with _open_within(url, _ANSWER_SECONDS) as response:
            total = int(response.headers.get("Content-Length") or 0)
            while part := response.read(2**18):
                parts.append(part)
                done += len(part)
                report(Event(phase="fetch", done=done, total=max(total, done), unit="bytes"))
                if done > _MAX_BYTES or time.monotonic() > deadline:
                    raise FetchError(f"{url} is too large or too slow")
    except (OSError, HTTPException, ValueError) as error:
        raise FetchError(f"{url}: {error}") from None
    if done < total:
        raise FetchError(f"{url} broke off after {done} of {total} bytes")
    return b"".join(parts)


def _open_within(url: str, seconds: float) -> HTTPResponse:
    """Opens an address; looking up a name has no timeout of its own, hence the thread."""
    answers: queue.SimpleQueue[HTTPResponse | OSError | HTTPException | ValueError] = (
        queue.SimpleQueue()
    )

    def work() -> None:
        try:
            answers.put(urllib.request.urlopen(url, timeout=seconds))
        except (OSError, HTTPException, ValueError) as error:
            answers.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        answer = answers.get(timeout=seconds)
    except queue.Empty:
        raise FetchError(f"{url} did not answer within {seconds:.0f} s") from None
    if isinstance(answer, OSError | HTTPException | ValueError):
        raise FetchError(f"{url}: {answer}")
    return answer


def _gunzip(data: bytes, name: str) -> bytes:
    try:
        stream = zlib.decompressobj(wbits=31)
        content = stream.decompress(data, _MAX_BYTES)
    except zlib.error as error:
        raise RefusedError(f"{name}.gz cannot be decompressed: {error}") from None
    if not stream.eof:
        raise RefusedError(f"{name}.gz is truncated or too large")
    return content


def _start(path: Path) -> bytes:
    """A file, or as much of it as is taken; what is longer is then found to be truncated."""
    with path.open("rb") as file:
        return file.read(_MAX_BYTES)
