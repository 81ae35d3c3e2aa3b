"""A model that was made faster predicts what it predicted, and the model that was given stays as it was."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import emca_bench
from emca_bench.data import Scenes
from emca_bench.deploy.folding import fold_batch_norms, fold_mask_projection
from emca_bench.deploy.onednn import use_onednn_layers
from emca_bench.errors import UsageError
from emca_bench.inference import semantic
from emca_bench.models import ATTENTIONS, Predictions, build_attention, build_model
from emca_bench.models.backbones.resnet import FrozenBatchNorm2d
from emca_bench.models.mask2former import Mask2Former
from emca_bench.onednn import refuses
from emca_bench.train import Recipe, train

CLASSES = 5
needs_onednn = pytest.mark.skipif(refuses(torch.empty(0)) is not None, reason="this torch has no oneDNN")


def lively(model: Mask2Former) -> Mask2Former:
    """Norms with statistics of their own, masks of either sign, distinct classes: nothing is one or zero by chance of its start."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm2d, FrozenBatchNorm2d)):
                for name, low in (("weight", 0.5), ("running_var", 0.5), ("bias", -0.2), ("running_mean", -0.2)):
                    tensor: Tensor = getattr(module, name)
                    tensor.uniform_(low, low + (1 if low > 0 else 0.4))
        predictor: Any = model.sem_seg_head.predictor
        nn.init.normal_(predictor.mask_embed.layers[-1].weight)
        nn.init.normal_(predictor.class_embed.weight)
        # no class that all queries like best
        predictor.class_embed.bias -= model.eval()(images(2, 3, 64, 96)).class_logits.mean((0, 1))
    return model.requires_grad_(False)


def make(name: str = "mask2former_tiny", attention: str = "masked", **overrides: Any) -> Mask2Former:
    return lively(build_model(name, num_classes=CLASSES, attention=attention, **overrides))


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return 255 * torch.rand(shape, dtype=dtype)


def difference(found: Predictions, wanted: Predictions) -> float:
    """The largest of a class or mask logit, in units of the largest logit."""
    assert found.image_size == wanted.image_size
    pairs = ((found.class_logits, wanted.class_logits), (found.mask_logits, wanted.mask_logits))
    assert all(one.shape == other.shape for one, other in pairs)
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)


def assert_same(found: Predictions, wanted: Predictions, tolerance: float) -> None:
    assert difference(found, wanted) <= tolerance


def equal_labels(found: Predictions, wanted: Predictions, size: tuple[int, int]) -> float:
    """The share of pixels with the same class."""
    return float((semantic(found, size) == semantic(wanted, size)).double().mean())


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_exact_rewrites_change_nothing_in_float64(attention: str) -> None:
    """With rounding out of the way every attention, those that choose pixels too, sees the same masks and scores."""
    model = make(attention=attention).double()
    batch = images(2, 3, 65, 97, dtype=torch.float64)
    if attention == "random":
        pytest.skip("draws its pixels")
    assert_same(emca_bench.optimize(model)(batch), model(batch), 1e-9)


@pytest.mark.parametrize(
    "switches",
    [
        {"selection": "softmax", "heads": 4, "head_split": "features", "temperature": "per_head"},
        {"selection": "pool_and_prototype", "selection_gradient": "straight_through", "alpha": "one", "norm_axis": "none"},
        {"alpha": "zero", "heads": 4, "head_split": "features"},
        {"product": "plain"},
    ],
    ids=str,
)
def test_switches_of_emca_are_the_same_in_float64(switches: dict[str, Any]) -> None:
    model = make(attention="emca", attention_switches=switches).double()
    batch = images(2, 3, 65, 97, dtype=torch.float64)
    assert_same(emca_bench.optimize(model)(batch), model(batch), 1e-9)


@pytest.mark.parametrize("attention", ["masked_fused", "mask_mean", "emca"])
def test_winners_are_the_same_in_float64(attention: str) -> None:
    model = make(attention=attention, mask_rule="winner").double()
    batch = images(2, 3, 65, 97, dtype=torch.float64)
    assert_same(emca_bench.optimize(model)(batch), model(batch), 1e-9)


def test_pem_is_the_same_in_float64() -> None:
    model = make("pem_r50", "pem_ca", layers=2).double()
    given = images(2, 3, 65, 97, dtype=torch.float64)
    assert_same(emca_bench.optimize(model)(given), model(given), 1e-9)


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (32, 200)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["mask2former_tiny", "mask2former_lite0"])
def test_outputs_are_the_same_in_float32(name: str, batch: int, size: tuple[int, int]) -> None:
    """Without the step at a mask logit of zero, which rounding can take to the other side in any two implementations."""
    model = make(name, "none")
    given = images(batch, 3, *size)
    wanted, found = model(given), emca_bench.optimize(model)(given)
    assert_same(found, wanted, 1e-4)
    assert equal_labels(found, wanted, size) >= 0.999


def test_mask2former_r50_is_the_same_in_float32() -> None:
    model = make("mask2former_r50", "none")
    given = images(2, 3, 100, 161)
    wanted, found = model(given), emca_bench.optimize(model)(given)
    assert_same(found, wanted, 1e-4)
    assert equal_labels(found, wanted, (100, 161)) >= 0.999


@pytest.mark.parametrize("attention", ["masked_fused", "emca"])
def test_trained_models_are_the_same_in_float32(attention: str) -> None:
    """What was learned is not on the edge of a mask: pixels that rounding would let in or keep out are rare, unlike with random weights."""
    model = build_model("mask2former_tiny", num_classes=10, attention=attention, queries=12, width=32)
    recipe = Recipe(steps=40, batch=4, crop=(64, 64), points=64, learning_rate=2e-3)
    train(model, list(Scenes("train", size=(64, 96), count=16)), recipe, classes=10, task="panoptic", pretrained_backbone=False)
    faster = emca_bench.optimize(model.eval())
    differences, equal = [], []
    with torch.inference_mode():
        for sample in Scenes("test", size=(65, 97), count=20):
            image = torch.from_numpy(sample.image).permute(2, 0, 1)[None].float()
            found, wanted = faster(image), model(image)
            differences.append(difference(found, wanted))
            equal.append(equal_labels(found, wanted, (65, 97)))
    # a single pixel on the edge may still change a query of one image
    assert statistics.median(differences) <= 1e-4
    assert statistics.median(equal) >= 0.999


@needs_onednn
@pytest.mark.parametrize("allowed", [0.0, 0.3, 1.0])
def test_masked_attention_through_onednn_is_the_same(allowed: float) -> None:
    plain = build_attention("masked", width=64).eval().requires_grad_(False)
    faster = copy.deepcopy(plain)
    use_onednn_layers(faster)
    faster.fused = True  # type: ignore[assignment]
    assert type(faster) is not type(plain)
    queries, position = torch.randn(2, 2, 7, 64)
    features, feature_pos = torch.randn(2, 2, 35, 64)
    mask = torch.rand(2, 7, 35) < allowed
    wanted, found = (one(queries, position, features, feature_pos, mask, shape=(5, 7)) for one in (plain, faster))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bias", [-1e4, 1e4], ids=["empty", "full"])
def test_empty_and_full_masks(bias: float) -> None:
    model = make("mask2former_tiny", "masked")
    predictor: Any = model.sem_seg_head.predictor
    # an embedding along which all mask features point the other way, or the same
    nn.init.zeros_(predictor.mask_embed.layers[-1].weight)
    nn.init.constant_(predictor.mask_embed.layers[-1].bias, bias)
    pixel_decoder: Any = model.sem_seg_head.pixel_decoder
    nn.init.zeros_(pixel_decoder.mask_features.weight)
    nn.init.ones_(pixel_decoder.mask_features.bias)
    given = images(2, 3, 64, 96)
    wanted, found = model(given), emca_bench.optimize(model)(given)
    assert bool((wanted.mask_logits < 0).all()) is (bias < 0)
    assert_same(found, wanted, 1e-4)


def test_the_model_that_is_given_stays_as_it_was() -> None:
    model = make("mask2former_tiny", "masked").train().requires_grad_(True)
    before = copy.deepcopy(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    emca_bench.optimize(model, dtype=torch.bfloat16)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [type(module) for module in model.modules()] == kinds
    assert model.training
    assert model.sem_seg_head.predictor.mask_source == "logits"
    assert all(parameter.requires_grad and parameter.is_contiguous() for parameter in model.parameters())


def test_every_batch_norm_behind_a_convolution_is_folded() -> None:
    """R50 has 53; PEM's deformable and transposed convolutions keep theirs, and so does what stands in front of a convolution."""
    model = make("mask2former_r50")
    assert fold_batch_norms(model) == 53
    assert not any(isinstance(module, (nn.BatchNorm2d, FrozenBatchNorm2d)) for module in model.modules())
    pem = make("pem_r50", "pem_ca", layers=3)
    assert fold_batch_norms(pem) == 53 + 6 + 4
    kept = [name for name, module in pem.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(kept) == 2 * 3 + 3
    assert all(name.endswith(("dcn_bn", "up_bn", "local_conv.norm")) for name in kept)


def test_the_mask_projection_goes_to_the_side_of_the_queries() -> None:
    model = make("mask2former_tiny", "none", mask_source="features")
    given = images(2, 3, 64, 96)
    wanted = model(given)
    assert fold_mask_projection(model)
    assert isinstance(model.sem_seg_head.pixel_decoder.mask_features, nn.Identity)
    assert_same(model(given), wanted, 1e-5)
    assert not fold_mask_projection(model)


@needs_onednn
def test_a_half_precision_model_takes_the_same_images() -> None:
    if refuses(torch.empty(0, dtype=torch.bfloat16)):
        pytest.skip("this processor has no bfloat16")
    equal = []
    for _ in range(5):
        model = make("mask2former_tiny", "none")
        given = images(2, 3, 65, 97)
        wanted, found = model(given), emca_bench.optimize(model, dtype=torch.bfloat16)(given)
        assert found.mask_logits.dtype == torch.bfloat16
        equal.append(equal_labels(found, wanted, (65, 97)))
    # random classes may be nearly equal in one of them
    assert statistics.median(equal) > 0.9


def test_without_onednn_the_layers_stay_torchs() -> None:
    model = make("mask2former_tiny", "masked")
    kinds = {type(module).__module__ for module in emca_bench.optimize(model, use_onednn=False).modules()}
    assert "emca_bench.deploy.onednn" not in kinds


@pytest.mark.parametrize("attention", ["masked", "emca"])
def test_compiles_without_a_graph_break(attention: str) -> None:
    faster = emca_bench.optimize(make("mask2former_tiny", attention), use_onednn=False)
    given = images(1, 3, 64, 96)
    torch._dynamo.reset()
    explained = torch._dynamo.explain(faster)(given)
    assert explained.graph_count == 1
    assert explained.graph_break_count == 0, explained.break_reasons


def test_one_graph_serves_all_sizes() -> None:
    faster = emca_bench.optimize(make("mask2former_tiny", "none", layers=1), use_onednn=False)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(faster, fullgraph=True, dynamic=True, backend=counter)
    for size in ((64, 96), (128, 160)):
        given = images(1, 3, *size)
        assert_same(compiled(given), faster(given), 1e-5)
    assert counter.frame_count == 1


class PeakMemory(TorchDispatchMode):
    """Most bytes of tensors that are alive at the same time, of those that operators made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        result = func(*args, **(kwargs or {}))
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and one.untyped_storage()._cdata not in given:
                storage = one.untyped_storage()
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


def published_semantic(predictions: Predictions, size: tuple[int, int]) -> Tensor:
    """Every mask at the size of the image, as the published code has them."""
    logits = nn.functional.interpolate(predictions.mask_logits, size=size, mode="bilinear", align_corners=False)
    return torch.einsum("bqc,bqhw->bchw", predictions.class_logits.softmax(-1)[..., :-1], logits.sigmoid()).argmax(1)


def test_the_counter_of_this_test_counts() -> None:
    with PeakMemory() as counter:
        first = torch.empty(1000, device="meta") + 1
        second = first * 2
        del first
        second.view(10, 100).add_(1)
        second + 1
    assert counter.peak == 2 * 4000


def test_decoder_and_labels_take_at_most_half_of_the_published_memory() -> None:
    """At 1024x2048, counted without values."""
    size = (1024, 2048)
    model = build_model("mask2former_r50", num_classes=19, attention="masked").eval().requires_grad_(False)
    faster: Any = emca_bench.optimize(model).to("meta")
    model.to("meta")
    shapes = [(1024 // stride, 2048 // stride) for stride in (4, 32, 16, 8)]
    mask_features, *pyramid = (torch.empty(1, 256, *shape, device="meta").to(memory_format=torch.channels_last) for shape in shapes)
    peaks = []
    for one, label in ((model, published_semantic), (faster, semantic)):
        with torch.inference_mode(), PeakMemory() as counter:
            label(one.sem_seg_head.predictor(mask_features, pyramid, image_size=size), size)
        peaks.append(counter.peak)
    assert peaks[0] > 2 * 100 * size[0] * size[1] * 4
    assert 2 * peaks[1] <= peaks[0]


@pytest.mark.parametrize(
    ("wrong", "options", "words"),
    [
        (nn.Linear(2, 2), {}, "a Linear; expected a Mask2Former"),
        (None, {"dtype": torch.int8}, "dtype=torch.int8; expected one of torch.float64"),
        (
            None,
            {"dtype": torch.float64, "use_onednn": True},
            "use_onednn=True, but oneDNN serves float32 and bfloat16, found torch.float64",
        ),
    ],
)
def test_what_cannot_be_optimized_is_an_error(wrong: nn.Module | None, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        emca_bench.optimize(make() if wrong is None else wrong, **options)


def test_an_unknown_name_of_the_package_is_an_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        emca_bench.optimise  # noqa: B018
