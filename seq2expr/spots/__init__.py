"""Spots as training and test rows: splits, controls and metrics that keep their numbers honest."""
