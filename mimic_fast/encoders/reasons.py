"""Other libraries' errors as part of our one-line messages.

Their text may quote a hostile file: line breaks and terminal escapes in it are shown, not sent.
"""


def reason(error: BaseException, *, line: int = 0) -> str:
    """One printable line, at most 200 characters, of what an error says.

    Args:
        error: Any exception.
        line: Which line of its text; the last is -1.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[line][:200].encode("unicode_escape").decode("ascii")
