"""Measuring encoders: triggers, probes, metrics, agreement."""
