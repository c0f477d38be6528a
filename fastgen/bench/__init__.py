"""Benchmarks of the operators against plain PyTorch, for ``fastgen bench`` and ``benchmarks/``."""
