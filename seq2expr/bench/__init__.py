"""A grid of runs over folds and seeds, scored together: which differences hold."""
