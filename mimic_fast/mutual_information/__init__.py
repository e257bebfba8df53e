"""Step A: which layers hold benign knowledge."""
