"""The attacks that purification is tested against: one file, one paper."""
