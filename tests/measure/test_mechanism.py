"""The generated tasks ask what they say, and tell the mechanisms apart."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

from emca_bench.errors import UsageError
from emca_bench.measure.mechanism import MODES, NOISE, VALUES, make_puzzle, measure_mechanism
from emca_bench.specs import Arm

PARAMS = {"pixels": "8x8", "queries": 8, "width": 24, "batch": 12, "steps": 150, "seed": 0, "learning_rate": 6e-3}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "masked": ("masked_fused", {}),
    "soft": ("emca_soft", {}),
    "soft_heads": ("emca_soft", {"heads": 2, "head_split": "features", "temperature": "per_head"}),
    "straight": ("emca", {"residual": "raw", "selection_gradient": "straight_through", "temperature": "fixed"}),
    "pooling": ("mask_pooling", {}),
    "top4": ("emca", {"selection": "topk_mean", "prototypes": 4}),
    "argmax": ("emca", {}),
    "random": ("emca", {"selection": "random"}),
    "none": ("none", {}),
}


@lru_cache
def explained(name: str, need: str) -> float:
    attention, switches = ARMS[name]
    arm = Arm(name=name, attention=attention, switches=switches)
    return float(measure_mechanism(arm, {**PARAMS, "need": need})["values"]["explained"])


@pytest.mark.parametrize("need", ["one", "mean", "modes"])
def test_answers_are_in_the_pixels_that_a_query_may_see(need: str, seed: int):
    marks = torch.eye(6)[:, :6] * 20
    puzzle = make_puzzle(need, marks, batch=3, pixels=80, random=torch.Generator().manual_seed(seed))
    assert (puzzle.allowed_BQP.sum(1) == 1).all()
    for b in range(3):
        for q in range(6):
            own = puzzle.allowed_BQP[b, q]
            assert bool(puzzle.asked_BQ[b, q]) == (own.sum() >= MODES)
            if not puzzle.asked_BQ[b, q]:
                continue
            values, carried = puzzle.features_BPC[b, own, :VALUES], puzzle.features_BPC[b, own, VALUES + q]
            found = {"one": values[carried > 10], "modes": values[carried > 10], "mean": values}[need]
            assert len(found) == {"one": 1, "modes": MODES, "mean": int(own.sum())}[need]
            torch.testing.assert_close(puzzle.answers_BQV[b, q], found.sum(0) / len(found) ** 0.5)
    assert puzzle.features_BPC[..., :VALUES].std() == pytest.approx(1, abs=0.1)
    assert NOISE < 1


def test_a_task_is_learned_on_its_device():
    """What cannot be carried out there is an error, not a number from the CPU."""
    arm, params = Arm(name="masked", attention="masked_fused"), {**PARAMS, "need": "one", "device": "cuda"}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        assert measure_mechanism(arm, params)["values"]["explained"] > 80
        assert torch.cuda.max_memory_allocated() > 0
    else:
        with pytest.raises((AssertionError, RuntimeError), match=r"(?i)cuda"):
            measure_mechanism(arm, params)


def test_an_attention_over_the_mask_learns_all_three():
    for need in ("one", "mean", "modes"):
        assert min(explained("masked", need), explained("soft", need)) > 80, need


def test_two_pixels_are_told_apart_by_two_heads(seed: int):
    """One softmax gives the sum of both, of which half of the variance is the other; two see each pixel for itself."""
    for name in ("masked", "soft_heads"):
        assert explained(name, "apart") > 90, name
    assert 40 < explained("soft", "apart") < 60
    assert explained("pooling", "apart") < 25


def test_a_choice_that_is_trained_finds_its_pixel_and_no_other():
    assert explained("straight", "one") > 90
    assert explained("straight", "mean") < 30


def test_marks_of_two_pixels_differ_and_each_gives_its_half_of_the_answer(seed: int):
    marks = torch.eye(6) * 20
    puzzle = make_puzzle("apart", marks, batch=2, pixels=80, random=torch.Generator().manual_seed(seed))
    for b, q in puzzle.asked_BQ.nonzero().tolist():
        own = puzzle.allowed_BQP[b, q]
        values, carried = puzzle.features_BPC[b, own, :VALUES], puzzle.features_BPC[b, own, VALUES:]
        [first], [second] = values[carried[:, q] > 10], values[carried[:, (q + 1) % 6] > 10]
        torch.testing.assert_close(puzzle.answers_BQV[b, q], torch.cat([first[: VALUES // 2], second[VALUES // 2 :]]))


def test_pooling_learns_the_mean_and_cannot_choose():
    assert explained("pooling", "mean") > 90
    assert explained("pooling", "one") < 40
    assert explained("pooling", "modes") < 75


def test_argmax_does_not_learn_where_to_look():
    """Nothing trains its choice: it finds one marked pixel no better than pooling, and misses all others by definition."""
    for need in ("one", "mean", "modes"):
        assert explained("argmax", need) < 40, need
        assert explained("argmax", need) < explained("soft", need) - 40, need


def test_several_prototypes_average_and_one_does_not():
    assert explained("top4", "mean") > explained("argmax", "mean") + 15
    assert explained("top4", "modes") > explained("argmax", "modes") + 5
    assert explained("top4", "one") < 50


def test_the_floors():
    for need in ("one", "mean", "modes"):
        assert abs(explained("none", need)) < 5
        assert explained("random", need) < 30


def test_a_seed_is_one_number():
    arm = Arm(name="soft", attention="emca_soft")
    one, again, other = (
        measure_mechanism(arm, {**PARAMS, "need": "one", "steps": 3, "seed": seed})["values"]["explained"] for seed in (1, 1, 2)
    )
    assert one == again
    assert one != other


def test_a_width_without_room_for_marks_is_refused():
    with pytest.raises(UsageError, match="'width' is 8; expected more than 8"):
        measure_mechanism(Arm(name="none", attention="none"), {**PARAMS, "need": "one", "width": 8})
