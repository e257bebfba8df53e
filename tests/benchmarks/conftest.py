"""The benchmarks are scripts beside the package, not installed: made importable here."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # they import each other as scripts do
