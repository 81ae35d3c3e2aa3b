"""Our model and Hugging Face's with the same weights are one function: outputs, losses, gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from emca_bench.integrations.transformers import from_transformers
from emca_bench.models import Predictions
from emca_bench.models.checkpoints import to_original_names
from emca_bench.models.criterion import Criterion
from emca_bench.models.mask2former import Mask2Former

OUTPUTS, LOSSES, GRADIENTS = 1e-5, 1e-5, 1e-3
SIZES = {"resnet": (96, 128), "resnet_basic": (64, 160), "swin": (96, 160), "resnet50": (96, 128)}
DRAWS = 8


@dataclass
class Truth:
    labels: Tensor
    masks: Tensor


@dataclass
class Pair:
    """Both models' predictions for the same image."""

    hf: Any
    ours: Mask2Former
    images: Tensor
    found: Predictions
    wanted: list[tuple[Tensor, Tensor]]
    """(class logits, mask logits) of Hugging Face's model: auxiliary ones first, the last one last."""

    @property
    def predictions(self) -> list[tuple[Tensor, Tensor]]:
        """Ours in the same order."""
        return [(each.class_logits, each.mask_logits) for each in (*self.found.auxiliary, self.found)]


def off(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, in units of the largest value."""
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max())


def a_mask_differs(pair: Pair, size: tuple[int, int]) -> bool:
    """Whether rounding has put a pixel of a layer's attention mask on the other side of zero: then the layers do different things."""
    for index, ((_, ours), (_, theirs)) in enumerate(zip(pair.predictions[:-1], pair.wanted[:-1], strict=True)):
        stride = (32, 16, 8)[index % 3]
        level = (size[0] // stride, size[1] // stride)
        masks = [F.interpolate(logits, size=level, mode="bilinear", align_corners=False) < 0 for logits in (ours, theirs)]
        if not torch.equal(*masks):
            return True
    return False


def predict(hf: Any, ours: Mask2Former, images: Tensor) -> Pair:
    """Both in training mode, for auxiliary outputs, with backbones in evaluation mode, for fixed statistics and no dropped paths."""
    for model, backbone in ((hf, hf.model.pixel_level_module.encoder), (ours, ours.backbone)):
        model.train()
        backbone.eval()
    theirs = hf((images - ours.pixel_mean) / ours.pixel_std, output_auxiliary_logits=True)
    wanted = [(each["class_queries_logits"], each["masks_queries_logits"]) for each in theirs.auxiliary_logits]
    return Pair(hf, ours, images, ours(images), [*wanted, (theirs.class_queries_logits, theirs.masks_queries_logits)])


def compared(make_hf: Callable[..., Any], backbone: str, batch: int = 2, **settings: Any) -> Pair:
    hf = make_hf(backbone, **settings)
    ours = from_transformers(hf, norm="batch")
    for _ in range(DRAWS):
        pair = predict(hf, ours, 255 * torch.rand(batch, 3, *SIZES[backbone]))
        if not a_mask_differs(pair, SIZES[backbone]):
            return pair
    raise AssertionError(f"a bit of a mask differs in each of {DRAWS} draws: that is no rounding")


def check_outputs(pair: Pair) -> None:
    assert len(pair.found.auxiliary) == len(pair.wanted) - 1 > 0
    for (classes, masks), (wanted_classes, wanted_masks) in zip(pair.predictions, pair.wanted, strict=True):
        assert off(classes, wanted_classes) < OUTPUTS
        assert off(masks, wanted_masks) < OUTPUTS


def truths(pair: Pair) -> list[Truth]:
    counts = torch.randint(1, 4, (len(pair.images),)).tolist()
    size, classes = pair.images.shape[-2:], pair.found.class_logits.shape[-1] - 1
    return [Truth(torch.randint(classes, (count,)), torch.rand(count, *size) < 0.4) for count in counts]


def both_losses(pair: Pair, targets: list[Truth], seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weighted losses of ours and of Hugging Face's, under our names; both draw the same points."""
    torch.manual_seed(seed)
    criterion = Criterion(classes=pair.found.class_logits.shape[-1] - 1)
    found = {name: criterion.total({name: loss}) for name, loss in criterion(pair.found, targets).items()}
    torch.manual_seed(seed)
    *auxiliary, (classes, masks) = pair.wanted
    wanted = pair.hf.get_loss_dict(
        masks_queries_logits=masks,
        class_queries_logits=classes,
        mask_labels=[target.masks.float() for target in targets],
        class_labels=[target.labels for target in targets],
        auxiliary_predictions=[{"class_queries_logits": each[0], "masks_queries_logits": each[1]} for each in auxiliary],
    )
    return found, {name.replace("loss_cross_entropy", "loss_ce"): loss for name, loss in wanted.items()}


def check_losses_and_gradients(pair: Pair, seed: int) -> None:
    found, wanted = both_losses(pair, truths(pair), seed)
    assert found.keys() == wanted.keys()
    assert len(found) == 3 * len(pair.wanted)
    for name, loss in wanted.items():
        assert off(found[name], loss) < LOSSES, name

    sum(found.values()).backward()
    sum(wanted.values()).backward()
    theirs = {name: parameter.grad for name, parameter in pair.hf.named_parameters() if parameter.grad is not None}
    gradients = to_original_names(theirs).tensors
    ours = dict(pair.ours.named_parameters())
    assert ours.keys() == gradients.keys()
    for name, parameter in ours.items():
        assert parameter.grad is not None, name
        assert off(parameter.grad, gradients[name]) < GRADIENTS, name


@pytest.mark.parametrize("backbone", ["resnet", "resnet_basic", "swin"])
def test_tiny_models_agree(make_hf: Callable[..., Any], backbone: str, seed: int) -> None:
    pair = compared(make_hf, backbone)
    check_outputs(pair)
    check_losses_and_gradients(pair, seed)


@pytest.mark.slow
def test_r50_models_agree_in_outputs_30_losses_and_gradients(make_hf: Callable[..., Any], seed: int) -> None:
    pair = compared(make_hf, "resnet50", batch=1, num_labels=150)
    check_outputs(pair)
    assert len(pair.wanted) == 10
    check_losses_and_gradients(pair, seed)


@pytest.mark.parametrize("backbone", ["resnet", "swin"])
def test_in_float64_they_agree_to_rounding(make_hf: Callable[..., Any], backbone: str) -> None:
    hf = make_hf(backbone).double()
    pair = predict(hf, from_transformers(hf, norm="batch"), 255 * torch.rand(2, 3, *SIZES[backbone], dtype=torch.float64))
    for (classes, masks), (wanted_classes, wanted_masks) in zip(pair.predictions, pair.wanted, strict=True):
        assert off(classes, wanted_classes) < 1e-12
        assert off(masks, wanted_masks) < 1e-12


@pytest.mark.parametrize("attention", ["masked", "masked_fused"])
@pytest.mark.parametrize("mask_source", ["logits", "features"])
def test_every_exact_form_agrees(make_hf: Callable[..., Any], attention: str, mask_source: str) -> None:
    hf = make_hf("resnet").double()
    ours = from_transformers(hf, attention=attention, mask_source=mask_source)
    images = 255 * torch.rand(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        found, wanted = ours(images), hf((images - ours.pixel_mean) / ours.pixel_std)
    assert off(found.class_logits, wanted.class_queries_logits) < 1e-12
    assert off(found.mask_logits, wanted.masks_queries_logits) < 1e-12
