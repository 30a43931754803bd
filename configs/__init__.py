"""Installed configuration files, one YAML per system and data set."""
