"""Hugging Face transformers: its Mask2Former as ours and back, and any attention inside its own model.

Pixels: Hugging Face's model takes `pixel_values` that its image processor has normalised and padded; ours takes RGB in 0..255 and does
both itself. `from_transformers` takes the statistics of the processor, where it is given one.
"""

from emca_bench.errors import UsageError
from emca_bench.models.backbones.torchvision_shim import make_torchvision_importable

make_torchvision_importable()
try:
    from transformers import Mask2FormerForUniversalSegmentation as _  # noqa: F401
except ImportError as error:
    raise UsageError(f"transformers 5.17 or newer is needed ({error}): python3 -m pip install 'emca-bench[transformers]'") from error

from emca_bench.integrations.transformers.convert import from_transformers, to_transformers
from emca_bench.integrations.transformers.drop_in import replace_cross_attention

__all__ = ["from_transformers", "replace_cross_attention", "to_transformers"]
