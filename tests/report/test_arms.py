"""Every arm of every study has words that a reader can read."""

from __future__ import annotations

from pathlib import Path

import pytest

from emca_bench.report.arms import LABELS, in_reading_order, label
from emca_bench.specs import load_studies

STUDIES = sorted((Path(__file__).parents[2] / "ablations").glob("*.toml"))
MODULES = {"grid_sample"}
"""Labels that are the name of a function."""


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_arm_of_a_study_has_a_label_of_its_own(path: Path):
    for study in load_studies(path):
        labels = {arm.name: label(arm.name) for arm in study.arms}
        assert len(set(labels.values())) == len(labels), labels
        assert not [words for words in labels.values() if ("_" in words and words not in MODULES) or "emca" in words or "bf16" in words]


@pytest.mark.parametrize(
    ("name", "words"),
    [("emca_first_round", "EMCA first round"), ("topk_mean_8_raw", "top-K mean 8 raw"), ("swin_l_ade_semantic", "Swin L ADE20K semantic")],
)
def test_an_arm_without_words_is_spelled_part_by_part(name: str, words: str):
    assert name not in LABELS
    assert label(name) == words


def test_known_arms_come_first_and_each_once():
    assert in_reading_order(["mine", "emca", "masked", "emca"]) == ["masked", "emca", "mine"]
