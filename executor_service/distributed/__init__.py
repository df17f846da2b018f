"""Tensor parallelism between processes: places, collectives, and the way of a plan from rank 0 to the others."""
