"""Slots, step inputs, and the loop that runs plans."""
