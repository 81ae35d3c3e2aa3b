"""Our model and Hugging Face's with the same weights are one function: outputs, losses, gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from emca_bench.integrations.transformers import from_transformers
from emca_bench.models import Predictions
from emca_bench.models.checkpoints import to_original_names
from emca_bench.models.criterion import Criterion
from emca_bench.models.mask2former import Mask2Former

SIZES = {"resnet": (96, 128), "resnet_basic": (64, 160), "swin": (96, 160), "resnet50": (96, 128)}
DRAWS = 8


class Tolerance(NamedTuple):
    outputs: float
    losses: float
    gradients: float


FLOAT32 = Tolerance(1e-5, 1e-5, 1e-3)
FLOAT64 = Tolerance(1e-11, 1e-11, 1e-9)


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


def apart(found: Tensor, wanted: Tensor) -> float:
    """The norm of the difference in units of the norm: one ReLU on the other side of zero moves a row of a gradient, and no more."""
    return float((found - wanted).norm() / wanted.norm())


class Chosen(TorchFunctionMode):
    """Records what every top-k chooses: the points of a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.indices: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.topk, torch.Tensor.topk):
            self.indices.append(result.indices.sort().values)
        return result


def a_mask_differs(pair: Pair, size: tuple[int, int]) -> bool:
    """Whether rounding has put a pixel of a layer's attention mask on the other side of zero: then the layers do different things."""
    for index, ((_, ours), (_, theirs)) in enumerate(zip(pair.predictions[:-1], pair.wanted[:-1], strict=True)):
        stride = (32, 16, 8)[index % 3]
        level = (size[0] // stride, size[1] // stride)
        masks = [F.interpolate(logits, size=level, mode="bilinear", align_corners=False).sigmoid() < 0.5 for logits in (ours, theirs)]
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


def compared(make_hf: Callable[..., Any], backbone: str, batch: int = 2, mask_source: str = "logits", **settings: Any) -> Pair:
    hf = make_hf(backbone, **settings)
    ours = from_transformers(hf, norm="batch", mask_source=mask_source)
    for _ in range(DRAWS):
        pair = predict(hf, ours, 255 * torch.rand(batch, 3, *SIZES[backbone]))
        if not a_mask_differs(pair, SIZES[backbone]):
            return pair
    raise AssertionError(f"a bit of a mask differs in each of {DRAWS} draws: that is no rounding")


def check_outputs(pair: Pair, tolerance: Tolerance) -> None:
    assert len(pair.found.auxiliary) == len(pair.wanted) - 1 > 0
    for (classes, masks), (wanted_classes, wanted_masks) in zip(pair.predictions, pair.wanted, strict=True):
        assert off(classes, wanted_classes) < tolerance.outputs
        assert off(masks, wanted_masks) < tolerance.outputs


def make_truths(pair: Pair) -> list[Truth]:
    counts = torch.randint(1, 4, (len(pair.images),)).tolist()
    size, classes = pair.images.shape[-2:], pair.found.class_logits.shape[-1] - 1
    return [Truth(torch.randint(classes, (count,)), torch.rand(count, *size) < 0.4) for count in counts]


def weighted_losses(pair: Pair, truths: list[Truth]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of ours and of Hugging Face's model, under our names, at the same random points.

    Points are drawn again while rounding makes the two choose different ones, a few of 12,544: then the losses are those of other points.
    """
    for _ in range(DRAWS):
        seed = int(torch.randint(2**31, ()))
        with torch.random.fork_rng(), Chosen() as ours:
            torch.manual_seed(seed)
            found = our_losses(pair, truths)
        with torch.random.fork_rng(), Chosen() as theirs:
            torch.manual_seed(seed)
            wanted = hf_losses(pair, truths)
        assert len(ours.indices) == len(theirs.indices) == len(pair.wanted)
        if all(torch.equal(*choices) for choices in zip(ours.indices, theirs.indices, strict=True)):
            return found, wanted
    raise AssertionError(f"other points in each of {DRAWS} draws: that is no rounding")


def our_losses(pair: Pair, truths: list[Truth]) -> dict[str, Tensor]:
    criterion = Criterion(classes=pair.found.class_logits.shape[-1] - 1)
    return {name: criterion.total({name: loss}) for name, loss in criterion(pair.found, truths).items()}


def hf_losses(pair: Pair, truths: list[Truth]) -> dict[str, Tensor]:
    *auxiliary, (classes, masks) = pair.wanted
    losses = pair.hf.get_loss_dict(
        masks_queries_logits=masks,
        class_queries_logits=classes,
        mask_labels=[truth.masks.to(masks.dtype) for truth in truths],
        class_labels=[truth.labels for truth in truths],
        auxiliary_predictions=[{"class_queries_logits": each[0], "masks_queries_logits": each[1]} for each in auxiliary],
    )
    return {name.replace("loss_cross_entropy", "loss_ce"): loss for name, loss in losses.items()}


def check_losses(pair: Pair, tolerance: Tolerance) -> list[str]:
    """And the parameters whose gradients, from the sum of all losses, are further apart than the tolerance."""
    found, wanted = weighted_losses(pair, make_truths(pair))
    assert found.keys() == wanted.keys()
    assert len(found) == 3 * len(pair.wanted)
    for name, loss in wanted.items():
        assert off(found[name], loss) < tolerance.losses, name

    sum(found.values()).backward()
    sum(wanted.values()).backward()
    theirs = {name: parameter.grad for name, parameter in pair.hf.named_parameters() if parameter.grad is not None}
    gradients = to_original_names(theirs).tensors
    ours = dict(pair.ours.named_parameters())
    assert ours.keys() == gradients.keys()
    assert all(parameter.grad is not None for parameter in ours.values())
    return [name for name, parameter in ours.items() if not apart(parameter.grad, gradients[name]) < tolerance.gradients]


def check(draw: Callable[[], Pair], tolerance: Tolerance) -> None:
    """Outputs, losses and gradients; with fresh models where rounding puts a ReLU on the other side of zero: that moves gradients."""
    for _ in range(DRAWS):
        pair = draw()
        check_outputs(pair, tolerance)
        if not (different := check_losses(pair, tolerance)):
            return
    raise AssertionError(f"gradients differ in each of {DRAWS} draws, last of {different}: that is no rounding")


@pytest.fixture
def float64() -> Iterator[None]:
    """As the default, so that both draw their points in it."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("backbone", ["resnet", "resnet_basic", "swin"])
def test_tiny_models_agree(make_hf: Callable[..., Any], backbone: str) -> None:
    check(lambda: compared(make_hf, backbone), FLOAT32)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("mask_source", ["logits", "features"])
@pytest.mark.parametrize("backbone", ["resnet", "resnet_basic", "swin"])
def test_in_float64_tiny_models_agree_to_rounding(make_hf: Callable[..., Any], backbone: str, mask_source: str) -> None:
    pair = compared(make_hf, backbone, mask_source=mask_source)
    assert pair.found.mask_logits.dtype == torch.float64
    check_outputs(pair, FLOAT64)
    assert not check_losses(pair, FLOAT64)


@pytest.mark.slow
def test_r50_models_agree_in_outputs_30_losses_and_gradients(make_hf: Callable[..., Any]) -> None:
    def draw() -> Pair:
        pair = compared(make_hf, "resnet50", batch=1, num_labels=150)
        assert len(pair.wanted) == 10
        return pair

    check(draw, FLOAT32)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_in_float64_r50_models_agree_to_rounding(make_hf: Callable[..., Any]) -> None:
    pair = compared(make_hf, "resnet50", batch=1, num_labels=150)
    check_outputs(pair, FLOAT64)
    assert not check_losses(pair, FLOAT64)


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
