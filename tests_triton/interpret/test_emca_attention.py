"""The whole layer by Triton kernels against the float64 reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from emca_kernels import Projections, emca_attention
from emca_kernels.emca_attention import reference, triton_kernels
from emca_kernels.emca_attention.arguments import SELECTIONS, Attended
from emca_kernels.masks import BoolMask
from emca_kernels.triton.runtime import Launch
from torch import Tensor

if TYPE_CHECKING:
    from conftest import Inputs, Maker

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MASKS = ("none", "bool", "packed", "logit", "embedding")
CASES = [(dtype, mask, SELECTIONS[(i + j) % 2]) for i, dtype in enumerate(DTYPES) for j, mask in enumerate(MASKS)]
CASES += [(dtype, mask, "mean") for dtype, mask in zip(DTYPES, ("embedding", "bool", "packed"), strict=True)]


class Layer:
    """A call's inputs beside those of a selection: parameters, the queries' position and the scale."""

    def __init__(self, make: Maker, inputs: Inputs, selection: str, *, keys: int | None = None, residual: str | None = None) -> None:
        width = inputs.features.shape[2]
        keys = keys or width
        dtype, device = inputs.features.dtype, inputs.features.device
        shapes = ((keys, width), (keys,), (keys, width), (keys,), (keys, keys), (keys,), (keys,), (width, keys), (width,))
        self.inputs = inputs
        self.projections = Projections(*((torch.randn(shape) / shape[-1] ** 0.5).to(device, dtype) for shape in shapes))
        self.query_position = make.lay_out(torch.randn(inputs.queries.shape).to(dtype)) if make.draw.random() < 0.5 else None
        self.scale = torch.tensor([0.3], dtype=dtype, device=device) if selection == "softmax" and make.draw.random() < 0.5 else None
        self.options = {"selection": selection, "residual": residual or make.draw.choice(("projected", "raw"))}
        print(f"D={keys} query_position={self.query_position is not None} scale={self.scale} {self.options}")

    def found(self, splits: int | None = 3) -> Attended:
        inputs = self.inputs
        tensors = (inputs.features, inputs.queries, inputs.mask, inputs.position, self.query_position, self.projections, self.scale)
        return triton_kernels.emca_attention(*tensors, **self.options, splits=splits)

    def chosen(self, dtype: torch.dtype) -> Attended:
        """Rows and what is kept of them, by the reference."""

        def to(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor.to(dtype)

        inputs = self.inputs
        tensors = (to(inputs.located), to(inputs.queries), inputs.allowed, None, to(self.query_position))
        return reference.emca_attention(*tensors, Projections(*map(to, self.projections)), to(self.scale), **self.options)

    def continued(self, attended: Attended, dtype: torch.dtype) -> Tensor:
        """The rest of the layer, from the rows that were found: whether a choice among near-equal pixels swapped does not matter."""
        inputs, projections = self.inputs, Projections(*(parameter.to(dtype) for parameter in self.projections))
        position = None if self.query_position is None else self.query_position.to(dtype)
        projected, _ = reference.project(inputs.queries.to(dtype), position, projections)
        rows = attended.rows_BQC.to(dtype)
        return reference.finish(rows, attended.kept_BQ, projected, inputs.queries.to(dtype), projections, self.options["residual"])[0]


def assert_rows_are_right(layer: Layer, found: Attended) -> None:
    inputs, exact = layer.inputs, layer.chosen(torch.float64)
    eps = torch.finfo(inputs.features.dtype).eps
    if layer.options["selection"] != "argmax":
        own = layer.chosen(inputs.features.dtype)
        # and a weight is as uncertain as its score, a float32 number of the size of the logsumexp
        band = (4 * eps + torch.finfo(torch.float32).eps * exact.kept_BQ.abs().max()) * exact.rows_BQC.abs().max()
        assert (found.rows_BQC - exact.rows_BQC).abs().max() <= 2 * (own.rows_BQC - exact.rows_BQC).abs().max() + band
        assert found.kept_BQ.dtype == torch.float32
        return
    assert found.kept_BQ.dtype == torch.int64
    assert torch.equal(found.rows_BQC, reference.rows_at(inputs.located, None, found.kept_BQ))
    projections = Projections(*(parameter.double() for parameter in layer.projections))
    position = None if layer.query_position is None else layer.query_position.double()
    _, folded = reference.project(inputs.queries.double(), position, projections)
    scores = folded @ inputs.located.double().mT
    allowed = None if inputs.allowed is None else inputs.allowed | ~inputs.allowed.any(-1, keepdim=True)
    open_scores = scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)
    regret = open_scores.amax(-1) - open_scores.gather(-1, found.kept_BQ[..., None])[..., 0]
    size = folded.abs() @ inputs.located.double().abs().mT
    assert regret.max() <= 8 * eps * size.max()


def assert_right(layer: Layer) -> None:
    found = layer.found()
    dtype = layer.inputs.features.dtype
    assert_rows_are_right(layer, found)
    truth, own = layer.continued(found, torch.float64), layer.continued(found, dtype)
    assert found.queries_BQC.dtype == dtype
    band = 8 * torch.finfo(dtype).eps * truth.abs().max()
    assert (found.queries_BQC - truth).abs().max() <= 2 * (own - truth).abs().max() + band


@pytest.mark.parametrize(("dtype", "mask", "selection"), CASES)
def test_as_exact_as_torch_in_the_same_dtype(make: Maker, dtype: torch.dtype, mask: str, selection: str) -> None:
    width = make.draw.choice((8, 48, 80, 144, 256))
    assert_right(Layer(make, make(dtype, mask, width=width, integers=mask == "embedding", pixels=make.draw.choice((1, 7, 100))), selection))


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("pixels", [1, 255, 1000])
def test_any_number_of_pixels(make: Maker, pixels: int, selection: str) -> None:
    assert_right(Layer(make, make(torch.float32, "bool", pixels=pixels, queries=15, width=16, integers=False), selection))


@pytest.mark.parametrize("queries", [1, 15, 37, 100, 130])
def test_any_number_of_queries(make: Maker, queries: int) -> None:
    assert_right(Layer(make, make(torch.float16, "packed", pixels=100, queries=queries, width=16, integers=False), "argmax"))


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize(("width", "keys"), [(24, 80), (80, 24)])
def test_keys_of_another_width(make: Maker, selection: str, width: int, keys: int) -> None:
    inputs = make(torch.float16, "bool", pixels=37, queries=15, width=width, integers=False)
    assert_right(Layer(make, inputs, selection, keys=keys, residual="raw"))


def test_ties_go_to_the_lowest_pixel(make: Maker) -> None:
    inputs = make(torch.float32, "bool", pixels=255, queries=37, width=16)
    layer = Layer(make, inputs, "argmax")
    layer.query_position = None
    whole = (parameter.mul_(4).round_() for parameter in layer.projections)
    layer.projections = Projections(*whole)
    assert torch.equal(layer.found().kept_BQ, layer.chosen(torch.float64).kept_BQ)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_full_and_empty_masks_look_everywhere(make: Maker, selection: str) -> None:
    inputs = make(torch.float32, "none", pixels=255, queries=15, width=16, integers=False)
    layer = Layer(make, inputs, selection)
    shape = (inputs.features.shape[0], 15, 255)
    inputs.mask = BoolMask(torch.ones(shape, dtype=torch.bool, device=inputs.features.device))
    everywhere = layer.found()
    assert_right(layer)
    inputs.mask = BoolMask(torch.zeros(shape, dtype=torch.bool, device=inputs.features.device))
    for one, other in zip(layer.found(), everywhere, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_however_the_pixels_are_shared(make: Maker, dtype: torch.dtype) -> None:
    layer = Layer(make, make(dtype, "bool", pixels=255, queries=15, width=80, integers=False), "argmax")
    once = layer.found(splits=1)
    for splits in (1, 2, 4, None):
        for one, other in zip(layer.found(splits=splits), once, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_product_of_zero_has_no_direction(make: Maker, selection: str) -> None:
    layer = Layer(make, make(torch.float32, "bool", pixels=37, queries=15, width=16, integers=False), selection)
    layer.projections.product_weight_DD.zero_()
    layer.projections.product_bias_D.zero_()
    assert layer.found().queries_BQC.isfinite().all()
    assert_right(layer)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_two_launches(make: Maker, monkeypatch: pytest.MonkeyPatch, selection: str) -> None:
    layer = Layer(make, make(torch.float16, "embedding", pixels=37, queries=15, width=16, position=True), selection)
    launches: list[str] = []
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda self, device: (launches.append(self.kernel.fn.__name__), run(self, device)))
    layer.found()
    assert launches == ["emca_attention_fwd_kernel", "emca_attention_merge_kernel"]


@pytest.mark.parametrize("selection", SELECTIONS)
def test_by_the_name_of_the_backend_alone(make: Maker, selection: str) -> None:
    inputs = make(torch.float32, "bool", pixels=37, queries=15, width=16, position=True)
    layer = Layer(make, inputs, selection)
    tensors = (inputs.features, inputs.queries, inputs.mask, layer.projections)
    options = {"position": inputs.position, "query_position": layer.query_position, "scale": layer.scale, **layer.options}
    found = emca_attention(*tensors, **options, backend="triton")
    assert torch.equal(found, layer.found(splits=None).queries_BQC)


def test_wide_rows_are_composed_of_the_parts_that_serve_them(make: Maker) -> None:
    inputs = make(torch.float32, "bool", pixels=37, queries=15, width=272)
    layer = Layer(make, inputs, "argmax")
    with pytest.raises(ValueError, match="272 channels, at most 256"):
        emca_attention(inputs.features, inputs.queries, inputs.mask, layer.projections, backend="triton")
