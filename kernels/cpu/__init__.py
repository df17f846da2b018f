"""Computing on the CPU: a library in C (see layout.h and step.c), and eager PyTorch where it cannot be had."""
