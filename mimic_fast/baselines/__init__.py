"""Defences to compare with: one file, one paper."""
