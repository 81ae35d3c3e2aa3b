"""Hugging Face transformers: its Mask2Former as ours and back, and any attention inside its own model.

Pixels: Hugging Face's model takes `pixel_values` that its image processor has normalised and padded; ours takes RGB in 0..255 and does
both itself. `from_transformers` takes the statistics of the processor, where it is given one.
"""

import emca_bench.integrations.transformers.available  # noqa: F401
from emca_bench.integrations.transformers.convert import from_transformers, to_transformers
from emca_bench.integrations.transformers.drop_in import replace_cross_attention

__all__ = ["from_transformers", "replace_cross_attention", "to_transformers"]
