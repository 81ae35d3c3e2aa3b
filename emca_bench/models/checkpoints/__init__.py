"""Checkpoints: what a file holds, under whose names, and how it gets into a model."""

from emca_bench.models.checkpoints.convert import Conversion, convert
from emca_bench.models.checkpoints.files import CheckpointError, read_tensors, write_tensors
from emca_bench.models.checkpoints.load import LoadReport, load_checkpoint
from emca_bench.models.checkpoints.names import to_original_names, to_transformers_names

__all__ = [
    "CheckpointError",
    "Conversion",
    "LoadReport",
    "convert",
    "load_checkpoint",
    "read_tensors",
    "to_original_names",
    "to_transformers_names",
    "write_tensors",
]
