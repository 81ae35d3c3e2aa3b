"""Imported first: detectron2 beside any torchvision, or a sentence that says what to install."""

from emca_bench.errors import UsageError
from emca_bench.models.backbones.torchvision_shim import make_torchvision_importable

make_torchvision_importable()
try:
    import detectron2.modeling  # noqa: F401
except ImportError as error:
    raise UsageError(
        f"detectron2 is needed ({error}). PyPI has none under that name: run scripts/install_detectron2.sh, see docs/detectron2.md"
    ) from error
