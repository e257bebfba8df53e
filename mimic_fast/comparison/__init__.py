"""Attacks x defenses x seeds: every cell in a process of its own, resumable, in one table."""
