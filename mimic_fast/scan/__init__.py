"""Is this encoder suspicious? Scores from clean, unlabeled images alone: no trigger, no labels."""
