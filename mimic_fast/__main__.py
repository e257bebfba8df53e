"""``python -m mimic_fast`` is ``mimic-fast``."""

from mimic_fast.launch.cli import main

if __name__ == "__main__":
    main()
