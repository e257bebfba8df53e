"""pre-commit: files end in one newline, TOML parses, links lead somewhere, nothing is too large."""

import sys
import tomllib
from pathlib import Path

KB = 1000
LIMITS = {"mimic_fast/assets/": 4000 * KB, "benchmarks/encoders/": 4000 * KB, "": 500 * KB}


def problems(path: Path) -> list[str]:
    """What is wrong with one file."""
    if path.is_symlink():
        return [] if path.exists() else ["the link leads nowhere"]
    data = path.read_bytes()
    found: list[str] = []
    limit = next(size for start, size in LIMITS.items() if path.as_posix().startswith(start))
    if len(data) > limit:
        found.append(f"{len(data):,} bytes, at most {limit:,} allowed here")
    if b"\0" in data:
        return found
    if data and (not data.endswith(b"\n") or data.endswith(b"\n\n")):
        found.append("must end in one newline")
    if path.suffix == ".toml":
        try:
            tomllib.loads(data.decode())
        except ValueError as error:
            found.append(f"not valid TOML: {error}")
    return found


def main() -> int:
    """Checks the files named on the command line."""
    lines = [f"{name}: {text}" for name in sys.argv[1:] for text in problems(Path(name))]
    sys.stdout.writelines(f"{line}\n" for line in lines)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
