"""Tensors without data: meta tensors, and fake tensors on a device that the machine lacks."""
