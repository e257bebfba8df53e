"""Attacks x defenses x seeds from one matrix."""
