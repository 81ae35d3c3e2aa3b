"""The CUDA backend: what it refuses anywhere, and on a Hopper device the float64 reference."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from emca_kernels import explain_backend, select_prototypes
from emca_kernels.build import BuildError, built_library
from emca_kernels.select_prototypes.cuda import backend
from emca_kernels.select_prototypes.cuda.recipe import CUDA
from torch import Tensor

PIXELS = (1, 7, 255, 1000, 4099)
QUERIES = (1, 15, 37, 100, 130)
DTYPES = (torch.bfloat16, torch.float16)


class Device(Tensor):
    """A tensor that says that it is on a CUDA device."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0)


def pretended(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype).as_subclass(Device)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says that it has one, and cannot build for it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(backend, "unavailable", lambda: "no nvcc on the path")


@pytest.fixture
def cuda() -> torch.device:
    """A device that serves, or why there is none."""
    refusal = backend.refuses(torch.zeros(1, 1, 64), torch.zeros(1, 1, 64)) if not torch.cuda.is_available() else None
    refusal = refusal or backend.refuses(*(torch.zeros(1, 1, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2)))
    if refusal is not None:
        pytest.skip(refusal)
    return torch.device("cuda")


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.zeros(1, 2, 64), "cpu tensors"),
        (pretended(1, 2, 64, dtype=torch.float32), "float32"),
        (pretended(1, 2, 96), "C=96, needs one of 64, 128, 192, 256"),
        (pretended(1, 2, 320), "C=320, needs one of 64, 128, 192, 256"),
        (pretended(0, 2, 64), "empty tensors"),
        (pretended(1, 2, 64), "no nvcc on the path"),
    ],
)
def test_what_it_refuses(tensor: Tensor, reason: str) -> None:
    assert backend.refuses(tensor, tensor) == reason


@pytest.mark.usefixtures("hopper")
def test_other_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert backend.refuses(pretended(1, 2, 64), pretended(1, 2, 64)) == "compute capability 8.0, needs 9.0"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_asking_for_it_is_an_error() -> None:
    features, queries = torch.randn(1, 4, 64).bfloat16(), torch.randn(1, 2, 64).bfloat16()
    with pytest.raises(ValueError, match="backend='cuda' cannot serve this call of select_prototypes: no CUDA device"):
        select_prototypes(features, queries, backend="cuda")


@pytest.mark.parametrize(("k", "heads"), [(2, 1), (1, 4)])
def test_one_prototype_and_one_head(k: int, heads: int) -> None:
    with pytest.raises(ValueError, match=f"cannot serve this call of select_prototypes: k={k}, heads={heads}, expected 1 and 1"):
        backend.select_prototypes(torch.zeros(1, 4, 64), torch.zeros(1, 2, 64), None, None, k=k, heads=heads)


def test_it_is_never_chosen_or_built_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("looked for a device"))
    name, reason = explain_backend("select_prototypes", torch.zeros(1, 2, 4, dtype=torch.float64), torch.zeros(1, 2, 4))
    assert name == "reference"
    assert reason.endswith("cuda: serves when asked for")


def test_no_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nvcc"))
    with pytest.raises(BuildError, match=r"no .*nvcc on the path \(CUDACXX names another\)"):
        built_library(CUDA)


def test_a_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(BuildError, match="is built without CUDA"):
        built_library(CUDA)


@pytest.mark.parametrize(
    ("tensor", "copied"),
    [
        (torch.zeros(2, 5, 64, dtype=torch.bfloat16), False),
        (torch.zeros(2, 5, 72, dtype=torch.bfloat16)[..., :64], False),
        (torch.zeros(1, 5, 64, dtype=torch.bfloat16).expand(2, -1, -1), False),
        (torch.zeros(2, 5, 68, dtype=torch.bfloat16)[..., :64], True),
        (torch.zeros(2, 5, 72, dtype=torch.bfloat16)[..., 1:65], True),
        (torch.zeros(2, 64, 5, dtype=torch.bfloat16).mT, True),
        (torch.zeros(2, 1, 64, dtype=torch.bfloat16).expand(-1, 5, -1), True),
        (torch.zeros(65, dtype=torch.bfloat16)[1:].view(1, 1, 64), True),
    ],
)
def test_what_tensor_copies_cannot_read_is_copied(tensor: Tensor, copied: bool) -> None:
    readable = backend._copyable(tensor)
    assert (readable.data_ptr() != tensor.data_ptr()) == copied
    assert torch.equal(readable, tensor)
    assert readable.data_ptr() % 16 == 0
    assert readable.stride(2) == 1


def masks(kind: str, queries: int, pixels: int) -> Tensor | None:
    """None, or bool [2, Q, P] with empty and full rows."""
    if kind == "none":
        return None
    allowed = torch.rand(2, queries, pixels) < 0.2
    allowed[0, ::3] = False
    allowed[1, 1::4] = True
    return allowed


def poisoned(tensor: Tensor, layout: str) -> Tensor:
    """The same values inside of a larger tensor of NaN: rows apart, or channels apart as in a map [B, C, h, w]."""
    batch, rows, width = tensor.shape
    if layout == "rows":
        view = torch.full((batch, rows + 2, width + 16), torch.nan, dtype=tensor.dtype, device=tensor.device)[:, 1:-1, 8:-8]
    else:
        view = torch.full((batch, width, rows + 5), torch.nan, dtype=tensor.dtype, device=tensor.device)[:, :, 3:-2].mT
    return view.copy_(tensor)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pixels", PIXELS)
def test_ties_empty_and_full_masks_choose_as_the_reference(cuda: torch.device, pixels: int, dtype: torch.dtype, seed: int) -> None:
    """Small integers: exact sums and many ties. Each run draws other combinations."""
    draw = random.Random(seed)
    for queries in QUERIES:
        channels, layout = draw.choice(backend.WIDTHS), draw.choice(("rows", "channels"))
        features, asked = torch.randint(-3, 4, (2, pixels, channels)).to(dtype), torch.randint(-3, 4, (2, queries, channels)).to(dtype)
        allowed = masks(draw.choice(("none", "random")), queries, pixels)
        position = draw.choice((None, torch.randint(-2, 3, (draw.choice((1, 2)), pixels, channels)).to(dtype)))
        source = features.double() if position is None else features.double() + position.double()
        wanted = select_prototypes(source, asked.double(), allowed, backend="reference")
        given = poisoned(features.to(cuda), layout), poisoned(asked.to(cuda), "rows")
        mask, place = (None if tensor is None else tensor.to(cuda) for tensor in (allowed, position))
        found = select_prototypes(*given, mask, position=place, backend="cuda")
        assert torch.equal(found[0].cpu(), wanted[0])
        assert torch.equal(found[1].cpu(), wanted[1].to(dtype))


@pytest.mark.gpu
def test_packed_masks_choose_as_bool_masks(cuda: torch.device) -> None:
    features, queries = torch.randn(2, 1000, 256, device=cuda).bfloat16(), torch.randn(2, 100, 256, device=cuda).bfloat16()
    allowed = masks("random", 100, 1000)
    assert allowed is not None
    bits = torch.nn.functional.pad(allowed, (0, 24)).unflatten(-1, (-1, 32)).long() << torch.arange(32)
    words = bits.sum(-1).to(torch.uint32).view(torch.int32).to(cuda)
    found = backend.select_prototypes(features, queries, words, None, k=1, heads=1)
    wanted = backend.select_prototypes(features, queries, allowed.to(cuda), None, k=1, heads=1)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_choices_have_no_regret(cuda: torch.device, dtype: torch.dtype) -> None:
    """Random numbers: the float64 score of the choice is the best up to rounding, and the best one is chosen where it is clear."""
    features, queries = torch.randn(2, 1000, 128).to(dtype), torch.randn(2, 37, 128).to(dtype)
    allowed = masks("random", 37, 1000)
    assert allowed is not None
    indices, scores = (found.cpu() for found in select_prototypes(features.to(cuda), queries.to(cuda), allowed.to(cuda), backend="cuda"))
    best, values = select_prototypes(features.double(), queries.double(), allowed, k=2, backend="reference")
    exact = queries.double() @ features.double().mT
    # the accumulators of tensor cores hold fewer bits than float32
    tolerance = 1e-4 * exact.abs().max()
    chosen = exact.gather(-1, indices[:, :, 0])
    assert (values[:, :, 0, :1] - chosen).max() <= tolerance
    clear = values[:, :, 0, 0] - values[:, :, 0, 1] > tolerance
    assert torch.equal(indices[:, :, 0, 0][clear], best[:, :, 0, 0][clear])
    torch.testing.assert_close(scores[:, :, 0].double(), chosen, rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
def test_all_negative_scores(cuda: torch.device) -> None:
    """A padded zero would win."""
    features, queries = torch.randint(1, 4, (1, 77, 64)).bfloat16(), -torch.randint(1, 4, (1, 19, 64)).bfloat16()
    wanted = select_prototypes(features.double(), queries.double(), backend="reference")
    found = select_prototypes(features.to(cuda), queries.to(cuda), backend="cuda")
    assert torch.equal(found[0].cpu(), wanted[0])
    assert (found[1] < 0).all()


@pytest.mark.gpu
def test_repeats_and_other_streams_do_not_change_a_bit(cuda: torch.device) -> None:
    features, queries = torch.randn(4, 32768, 256, device=cuda).bfloat16(), torch.randn(4, 100, 256, device=cuda).bfloat16()
    wanted = select_prototypes(features, queries, backend="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        again = [select_prototypes(features, queries, backend="cuda") for _ in range(50)]
    stream.synchronize()
    for found in again:
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])
