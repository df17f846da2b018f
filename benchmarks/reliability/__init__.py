"""What shows that processes may die and no stream does: docs/reliability.md has the figures."""
