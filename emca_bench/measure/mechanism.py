"""What a cross-attention can find at all: tasks whose answer is one pixel, the mean of many, several of them, or two told apart.

Generated and tiny, so that seconds on a CPU tell apart what months of training on images blur. They show what a mechanism can learn, and
nothing about accuracy on images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emca_bench.errors import UsageError
from emca_bench.models import build_attention
from emca_bench.models.attention.base import CrossAttention
from emca_bench.specs import Arm, parse_size

VALUES = 8
"""Width of what is asked for; the rest of a feature is its mark."""
MODES = 4
"""Marked pixels of an object where several are asked for."""
MARK_NORM = 3.0
NOISE = 0.3
"""Standard deviation of the marks of all pixels; what is marked has its query's mark added."""
TEST_BATCHES = 16
TEST_SEED = 1_000_003


class Puzzle(NamedTuple):
    """One batch.

    Attributes:
        features_BPC: a value and a mark per pixel.
        allowed_BQP: the pixels of each query's object.
        answers_BQV: what is asked for, of variance about 1.
        asked_BQ: queries whose object is large enough.
    """

    features_BPC: Tensor
    allowed_BQP: Tensor
    answers_BQV: Tensor
    asked_BQ: Tensor

    def to(self, device: torch.device) -> Puzzle:
        """The same batch elsewhere; draws are those of the CPU on every device."""
        return Puzzle(*(tensor.to(device) for tensor in self))


def make_puzzle(need: str, marks_QM: Tensor, *, batch: int, pixels: int, random: torch.Generator) -> Puzzle:
    """A batch of a task: pixels belong to objects at random, one per query, and a query may look at its object.

    Args:
        need: "one": the value of the one pixel of the object that carries the query's mark. "mean": the mean value of the object.
            "modes": the sum of the values of its MODES marked pixels. "apart": of two pixels with different marks, half of the value
            of each. All scaled to a variance of about 1.
        marks_QM: of the queries.
        batch, pixels: sizes.
        random: of all draws.
    """
    queries, width = marks_QM.shape
    values_BPV = torch.randn(batch, pixels, VALUES, generator=random)
    noise_BPM = NOISE * torch.randn(batch, pixels, width, generator=random)
    owner_BP = torch.randint(0, queries, (batch, pixels), generator=random)
    allowed_BQP = owner_BP[:, None] == torch.arange(queries)[None, :, None]
    sizes_BQ1 = allowed_BQP.sum(-1, keepdim=True).clamp(min=1)
    if need == "mean":
        answers_BQV = allowed_BQP.float() @ values_BPV / sizes_BQ1.sqrt()
    else:
        count = {"one": 1, "modes": MODES, "apart": 2}[need]
        drawn_BQP = torch.rand(batch, queries, pixels, generator=random).masked_fill(~allowed_BQP, -1)
        marked_BQN = drawn_BQP.topk(count, dim=-1).indices
        where_BQNP = F.one_hot(marked_BQN, pixels).float()
        # "apart" has a second mark, the first one turned by a place; the others mark all their pixels alike
        marks_QNM = torch.stack([marks_QM.roll(place if need == "apart" else 0, -1) for place in range(count)], 1)
        noise_BPM = noise_BPM + torch.einsum("bqnp,qnm->bpm", where_BQNP, marks_QNM)
        found_BQNV = where_BQNP @ values_BPV[:, None]
        answers_BQV = found_BQNV.sum(2) / count**0.5
        if need == "apart":
            answers_BQV = torch.cat([found_BQNV[:, :, 0, : VALUES // 2], found_BQNV[:, :, 1, VALUES // 2 :]], -1)
    return Puzzle(torch.cat([values_BPV, noise_BPM], -1), allowed_BQP, answers_BQV, sizes_BQ1[..., 0] >= MODES)


class Solver(nn.Module):
    """Marks and pixels in, answers out; between two linear layers nothing but the attention under test."""

    def __init__(self, attention: CrossAttention, width: int) -> None:
        super().__init__()
        self.attention = attention
        self.embed_queries = nn.Linear(width - VALUES, width)
        self.embed_pixels = nn.Linear(width, width)
        self.answer = nn.Linear(width, VALUES)
        with torch.no_grad():
            # marks start where they meet, so that what is learned is how to look and not where marks are kept
            self.embed_pixels.weight.copy_(torch.eye(width))
            self.embed_queries.weight.copy_(torch.eye(width)[:, VALUES:])
            nn.init.zeros_(self.embed_pixels.bias)
            nn.init.zeros_(self.embed_queries.bias)

    def forward(self, marks_QM: Tensor, puzzle: Puzzle, shape: tuple[int, int]) -> Tensor:
        """Answers [B, Q, VALUES]."""
        queries = self.embed_queries(marks_QM).expand(len(puzzle.features_BPC), -1, -1)
        features = self.embed_pixels(puzzle.features_BPC)
        return self.answer(self.attention(queries, None, features, None, puzzle.allowed_BQP, shape=shape))


def measure_mechanism(
    arm: Arm, params: Mapping[str, Any], *, on_progress: Callable[[int, int, str], None] = lambda done, total, text: None
) -> dict[str, Any]:
    """Train an attention on a task and test it on fresh batches.

    Returns:
        {"values": {"explained": ...}}: explained variance of the answers in per cent, 0 for always saying zero, 100 for all right.

    Raises:
        UsageError: a width without room for marks.
    """
    need, steps, seed, batch = str(params["need"]), int(params["steps"]), int(params["seed"]), int(params["batch"])
    shape, width, queries = parse_size(str(params["pixels"])), int(params["width"]), int(params["queries"])
    if width <= VALUES:
        raise UsageError(f"parameter 'width' is {width}; expected more than {VALUES}, which hold the value of a pixel")
    rate, device = float(params.get("learning_rate", 3e-3)), torch.device(str(params.get("device", "cpu")))
    torch.manual_seed(seed)
    marks_QM = torch.randn(queries, width - VALUES)
    marks_QM = MARK_NORM * marks_QM / marks_QM.norm(dim=-1, keepdim=True)
    solver = Solver(build_attention(arm.attention, width=width, **dict[str, Any](arm.switches)), width).train().to(device)
    optimizer = torch.optim.AdamW(solver.parameters(), lr=rate, weight_decay=0.0)
    random = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, 2 * (1 - step / steps))
        puzzle = make_puzzle(need, marks_QM, batch=batch, pixels=shape[0] * shape[1], random=random).to(device)
        errors = (solver(marks_QM.to(device), puzzle, shape) - puzzle.answers_BQV)[puzzle.asked_BQ].square()
        optimizer.zero_grad()
        errors.mean().backward()
        optimizer.step()
        on_progress(step + 1, steps, f"step {step + 1}/{steps}")
    return {"values": {"explained": _explained(solver.eval(), need, marks_QM, batch, shape)}}


@torch.no_grad()
def _explained(solver: Solver, need: str, marks_QM: Tensor, batch: int, shape: tuple[int, int]) -> float:
    device = solver.answer.weight.device
    random = torch.Generator().manual_seed(TEST_SEED)
    error = total = 0.0
    for _ in range(TEST_BATCHES):
        puzzle = make_puzzle(need, marks_QM, batch=batch, pixels=shape[0] * shape[1], random=random).to(device)
        answers = puzzle.answers_BQV[puzzle.asked_BQ]
        error += float((solver(marks_QM.to(device), puzzle, shape)[puzzle.asked_BQ] - answers).square().sum())
        total += float(answers.square().sum())
    return 100 * (1 - error / total)
