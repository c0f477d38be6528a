"""Benchmarks of the operators beside PyTorch, for ``fastgen bench`` and ``benchmarks/``."""
