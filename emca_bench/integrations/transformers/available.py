"""Imported first: transformers beside any torchvision, or a sentence that says what to install."""

from emca_bench.errors import UsageError
from emca_bench.models.backbones.torchvision_shim import make_torchvision_importable

make_torchvision_importable()
try:
    from transformers import Mask2FormerForUniversalSegmentation, ResNetConfig, SwinConfig  # noqa: F401
except ImportError as error:
    raise UsageError(f"transformers 5.17 or newer is needed ({error}): python3 -m pip install 'emca-bench[transformers]'") from error
