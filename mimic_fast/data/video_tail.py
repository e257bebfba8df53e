"""What the last bytes of a video say, in formats whose headers do not say how long it is."""

import os
from pathlib import Path

_PACKET, _LONG_PACKET, _SYNC = 188, 192, b"\x47"  # of transport streams; the long begin with a time
_OGG_PAGE, _OGG_MOST = b"OggS", 65_307  # a page and its largest size
_OGG_FLAGS, _OGG_LAST = 5, 4  # place of a page's flags, and the one that ends a stream
_GIF_END = b";"


def torn_end(path: Path, kind: str) -> str | None:
    """What is wrong where a file breaks off; None if nothing is, or its format has no such sign.

    Args:
        path: The file.
        kind: FFmpeg's name of its format.
    """
    with path.open("rb") as file:
        head = file.read(_LONG_PACKET + 5)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _OGG_MOST))
        tail = file.read(_OGG_MOST)
    match kind:
        case "mpegts":
            long = head[:1] != _SYNC and head[4:5] == head[_LONG_PACKET + 4 :] == _SYNC
            torn = size % (_LONG_PACKET if long else _PACKET)
            return "it ends within a transport packet" if torn else None
        case "gif":
            return None if tail.endswith(_GIF_END) else "its end mark is missing"
        case "ogg":
            flags = tail[tail.rfind(_OGG_PAGE) :][_OGG_FLAGS : _OGG_FLAGS + 1]
            last = bool(flags) and flags[0] & _OGG_LAST
            return None if last else "it ends before the page that is marked as the last"
        case _:
            return None
