"""Defenses to compare with: one file, one paper."""
