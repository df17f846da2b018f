"""Figures and the scripts that make them; LOG.md says what was tried."""
