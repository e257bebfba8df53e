"""Clean images: sources, the clean set, augmented views, batches."""
