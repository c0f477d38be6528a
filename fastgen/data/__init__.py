"""Datasets: bundled ones, or a user's own files; read without running code, split the same way every time."""

from __future__ import annotations

from fastgen.data._base import Dataset, Items, TensorItems
from fastgen.data.bundled import BUNDLED, SOURCES
from fastgen.data.config import DataConfig
from fastgen.data.describe import Description, describe
from fastgen.data.folders import image_paths
from fastgen.data.sources import bundled_name, load_data, read_images

__all__ = [
    "BUNDLED",
    "SOURCES",
    "DataConfig",
    "Dataset",
    "Description",
    "Items",
    "TensorItems",
    "bundled_name",
    "describe",
    "image_paths",
    "load_data",
    "read_images",
]
