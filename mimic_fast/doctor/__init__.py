"""What works on this machine, and whether a recipe could run here: ``mimic-fast doctor``."""
