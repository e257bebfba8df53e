import pytest

from mimic_fast.encoders.reasons import reason


@pytest.mark.parametrize(
    ("error", "line", "expected"),
    [
        (ValueError("first\nsecond"), 0, "first"),
        (ValueError("first\nsecond\n"), -1, "second"),
        (KeyError(), 0, "KeyError"),
        (ValueError("a\x1b[2J\x00b"), 0, r"a\x1b[2J\x00b"),
        (ValueError("caf\u00e9 \udcff"), 0, r"caf\xe9 \udcff"),
        (ValueError("x" * 500), 0, "x" * 200),
    ],
    ids=["first", "last", "empty", "escapes", "surrogate", "long"],
)
def test_reason_is_one_printable_line(error, line, expected):
    assert reason(error, line=line) == expected
