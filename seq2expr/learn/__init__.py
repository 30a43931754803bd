"""Training, evaluation and prediction; none of it knows a system by name."""
