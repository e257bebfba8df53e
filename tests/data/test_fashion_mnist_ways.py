import gzip
import http.server
import shutil
import socket
import subprocess
import threading
import time
from functools import partial

import pytest

from mimic_fast.data.fashion_mnist import SHA256, fetch_fashion_mnist
from mimic_fast.data.fashion_mnist_ways import (
    _APT_CONFIG,
    FetchError,
    from_apt,
    from_folder,
    from_mirrors,
)
from mimic_fast.progress import silent


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


@pytest.fixture
def mirror(tmp_path):
    """A real server on this machine and the folder it serves."""
    folder = tmp_path / "served"
    folder.mkdir()
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Quiet, directory=str(folder))
    ) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/", folder
        server.shutdown()
        thread.join()


def test_from_mirrors_takes_the_first_that_has_the_files(mirror):
    address, folder = mirror
    (folder / "a.gz").write_bytes(gzip.compress(b"content"))
    events = []
    found = from_mirrors([f"{address}absent", address], ["a"], events.append)
    assert found == {"a": b"content"}
    size = len(gzip.compress(b"content"))
    assert (events[-1].phase, events[-1].done, events[-1].total) == ("fetch", size, size)


def test_fetch_downloads_if_nothing_is_installed(mirror, fashion_archives, tmp_path):
    address, folder = mirror
    shutil.copytree(fashion_archives, folder, dirs_exist_ok=True)
    files = fetch_fashion_mnist(cache=tmp_path, installed=tmp_path / "absent", mirrors=[address])
    assert set(files) == set(SHA256)


def test_from_mirrors_missing_file_raises(mirror):
    address, _ = mirror
    with pytest.raises(FetchError, match=r"a\.gz: HTTP Error 404"):
        from_mirrors([address], ["a"], silent)


def test_from_mirrors_refused_connection_raises():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(FetchError, match="refused"):
            from_mirrors([f"http://127.0.0.1:{port}"], ["a"], silent)


def test_from_mirrors_server_that_never_answers_fails_within_seconds():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        start = time.monotonic()
        with pytest.raises(FetchError, match=r"did not answer within 4 s|timed out"):
            from_mirrors([f"http://127.0.0.1:{port}"], ["a"], silent)
        assert time.monotonic() - start < 8


def test_from_mirrors_connection_that_breaks_off_raises():
    def answer(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 100\r\n\r\nonly this")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer, args=(server,))
        thread.start()
        port = server.getsockname()[1]
        with pytest.raises(FetchError, match=r"broke off|IncompleteRead"):
            from_mirrors([f"http://127.0.0.1:{port}"], ["a"], silent)
        thread.join()


def test_from_mirrors_without_mirrors_raises():
    with pytest.raises(FetchError, match="no mirror"):
        from_mirrors([], ["a"], silent)


def test_from_folder_decompresses(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"content"))
    assert from_folder(tmp_path, ["a"]) == {"a": b"content"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no gzip", "cannot be decompressed"),
        (gzip.compress(b"content" * 100)[:-9], "is truncated or too large"),
        (gzip.compress(bytes(65 * 2**20)), "is truncated or too large"),
    ],
    ids=["garbage", "truncated", "bomb"],
)
def test_from_folder_bad_archive_raises(tmp_path, data, message):
    (tmp_path / "a.gz").write_bytes(data)
    with pytest.raises(FetchError, match=f"a.gz {message}"):
        from_folder(tmp_path, ["a"])


def test_from_folder_missing_file_raises(tmp_path):
    with pytest.raises(FetchError, match=r"a\.gz: No such file"):
        from_folder(tmp_path, ["a"])


@pytest.mark.skipif(shutil.which("apt-config") is None, reason="needs apt (Debian, Ubuntu)")
def test_apt_settings_stay_inside_the_folder_and_run_no_hooks(tmp_path):
    (tmp_path / "apt.conf").write_text(_APT_CONFIG.format(folder=tmp_path))
    command = ["apt-config", "-c", str(tmp_path / "apt.conf"), "dump"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    hooks = [line for line in lines if line.startswith("APT::") and "-Invoke" in line]
    assert [line for line in hooks if not line.endswith(' "";')] == []
    values = dict(line.rstrip(";").split(" ", 1) for line in lines if " " in line)
    for key in ("Dir::State", "Dir::Cache", "Dir::Log", "Dir::State::status"):
        assert values[key].strip('"').startswith(str(tmp_path))
    for key in ("Dir::State::lists", "Dir::Cache::archives"):
        assert not values[key].strip('"').startswith("/")


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="needs apt (Debian, Ubuntu)")
def test_from_apt_gives_the_files_and_leaves_nothing(tmp_path, capfd):
    from mimic_fast.data.fashion_mnist import _check

    try:
        contents = from_apt(tmp_path, tuple(SHA256), silent)
    except FetchError as error:
        pytest.skip(f"needs a Debian package archive: {error}")
    _check(contents)
    assert list(contents) == list(SHA256)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs apt (Debian, Ubuntu)")
def test_from_apt_failure_gives_its_last_line(tmp_path, monkeypatch):
    tools = tmp_path / "tools"
    tools.mkdir()
    script = tools / "apt-get"
    script.write_text("#!/bin/sh\necho noise\necho 'E: no such package' >&2\nexit 100\n")
    script.chmod(0o755)
    (tools / "dpkg-deb").symlink_to(shutil.which("dpkg-deb") or "")
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(FetchError, match="E: no such package"):
        from_apt(tmp_path, tuple(SHA256), silent)
    assert [path.name for path in tmp_path.iterdir()] == ["tools"]
