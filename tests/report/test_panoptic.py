"""Groups of task "panoptic": what the report says, tabulates and paints of one set of weights."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from emca_bench.errors import UsageError
from emca_bench.records import Record
from emca_bench.report.accuracy import accuracy_groups
from emca_bench.report.build import render, report_files
from emca_bench.report.load import load_run
from emca_bench.report.numbers import TIMES, minus
from emca_bench.report.segment_overlays import segment_overlay
from emca_bench.specs import Study

PQ = {"masked": 21.0, "emca": 16.0, "none": 12.0}


def panoptic_study(synthetic: SimpleNamespace, **fixed: object) -> Study:
    study = synthetic.accuracy_study()
    task = {"task": "panoptic", "object_threshold": 0.3, "overlap_threshold": 0.8}
    axes = {"dataset": ("scenes",), "seed": (0, 1, 2)}
    return replace(study, name="panoptic", arms=synthetic.arms(*PQ), axes=axes, fixed={**study.fixed, **task, **fixed}, expected=())


def with_segments(record: Record) -> Record:
    """Adds what a panoptic cell records; seeds move all arms alike, so that paired differences are exact."""
    shift = float(record.params["seed"])
    center = PQ[record.arm]
    values = {"pq": center + shift, "pq_things": center / 4, "pq_stuff": 2 * center, "sq": 70.0, "rq": 30.0}
    values |= {"ap": center / 10, "ap50": center / 5, "ap75": center / 20}
    values |= {"class_pq": {"sky": center, "car": 0.0, "pole": None}, "class_ap": {"sky": None, "car": center / 10, "pole": None}}
    return replace(record, values={**record.values, **values})


def write_segments(folder: Path, study: Study, synthetic: SimpleNamespace) -> None:
    """Truth and results of segments beside the label maps that are there."""
    random = np.random.default_rng(1)
    for truth in sorted((folder / "artifacts" / "scenes").glob("*/truth.png")):
        semantic = np.array(Image.open(truth)).astype(np.int64)
        segments = np.stack([semantic, np.where(semantic == 255, 0, semantic + 1 + np.arange(semantic.shape[1]) // 60 * 300)], -1)
        Image.fromarray(encoded(segments)).save(truth.with_name("truth_panoptic.png"))
        for cell in study.cells():
            target = folder / "artifacts" / "predictions" / cell.key("accuracy")
            if target.is_dir():
                moved = np.roll(segments, tuple(random.integers(-5, 6, 2)), (0, 1))
                Image.fromarray(encoded(moved)).save(target / f"{truth.parent.name}_panoptic.png")
                only_cars = np.where(moved[..., :1] == 4, moved, [255, 0])
                Image.fromarray(encoded(only_cars)).save(target / f"{truth.parent.name}_instances.png")


def encoded(segments: np.ndarray) -> np.ndarray:
    return np.stack([segments[..., 0], segments[..., 1] % 256, segments[..., 1] // 256], -1).astype(np.uint8)


@pytest.fixture
def run(make_run: Callable[..., Path], synthetic: SimpleNamespace) -> Path:
    study = panoptic_study(synthetic)
    folder = make_run([study], change=with_segments)
    write_segments(folder, study, synthetic)
    return folder


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}")[1].split("\n## ")[0]


def test_verdicts_rest_on_pq_and_every_metric_is_paired(run: Path):
    [group] = accuracy_groups(load_run(run))
    assert (group.task, group.metric.label) == ("panoptic", "PQ")
    emca = group.arm("emca")
    assert emca is not None
    assert emca.score is not None
    assert emca.score.estimate == pytest.approx(17)
    assert emca.difference is not None
    assert (emca.difference.estimate, emca.difference.low) == pytest.approx((-5, -5))
    assert emca.verdict == "worse"
    assert group.sensitivity == "can decide"
    assert {key: round(mean.estimate, 6) for key, mean in emca.differences.items() if key != "miou"} == {
        "pq": -5,
        "pq_things": -1.25,
        "pq_stuff": -10,
        "ap": -0.5,
    }
    assert group.arm("masked").differences == {}


def test_the_report_says_thresholds_sizes_and_all_metrics(run: Path):
    text = render(run, run / "out").markdown_path.read_text()
    accuracy = section(text, "Accuracy")
    assert "class score above 0.3 and keeps at least 80% of its mask (published: 0.8 and 80%)" in accuracy
    assert f"at 128{TIMES}128" in accuracy
    assert (
        accuracy.count(f"Object threshold 0.3, overlap threshold 0.8; trained on crops of 128{TIMES}128, scored at the images' own size.")
        == 3
    )
    row = next(line for line in accuracy.splitlines() if line.startswith("| `emca`"))
    shown = row.replace(minus("-"), "-")
    assert shown.startswith("| `emca` | 17.00 ± 2.48 | 3 | -5.00 [-5.00, -5.00] | worse | 4.00 ± 0.00 | 32.00 ± 0.00 | 1.60 ± 0.00 |")
    assert "costs 9.00 [9.00, 9.00] PQ (3 seeds), more than the margin of 0.5 PQ" in accuracy
    assert "EMCA (folded) reaches 17.00 ± 2.48 PQ" in text.split("\n## ")[0]
    assert "0.5 PQ." in section(text, "Method notes")
    assert "mIoU." not in section(text, "Method notes")
    assert "Segments: class score above 0.3" in section(text, "Qualitative results")
    # a class without truth and a stuff class have no row of AP
    assert "| sky |" in accuracy.split("PQ of every class")[1].split("</details>")[0]
    assert re.findall(r"^\| (\w+) \|", accuracy.split("AP of every thing")[1].split("</details>")[0], re.MULTILINE) == ["Class", "car"]


def test_the_summary_has_every_metric(run: Path):
    [entry] = json.loads(report_files(run)["summary.json"])["accuracy"]
    assert entry["arms"]["emca"]["pq"]["estimate"] == pytest.approx(17)
    assert entry["arms"]["emca"]["ap"]["repeats"] == 3
    assert entry["arms"]["emca"]["differences"]["pq_things"]["estimate"] == pytest.approx(-1.25)
    assert "miou" in entry["arms"]["emca"]


def test_published_thresholds_are_the_default(make_run: Callable[..., Path], synthetic: SimpleNamespace):
    study = panoptic_study(synthetic)
    fixed = {name: value for name, value in study.fixed.items() if not name.endswith("_threshold")}
    files = report_files(make_run([replace(study, fixed=fixed)], change=with_segments))
    assert "class score above 0.8 and keeps at least 80% of its mask; instances" in files["report.md"].decode()


def test_a_semantic_and_a_panoptic_study_stand_side_by_side(make_run: Callable[..., Path], synthetic: SimpleNamespace):
    semantic = synthetic.accuracy_study()
    folder = make_run([panoptic_study(synthetic)], change=with_segments, artifacts=False)

    def change(record: Record) -> Record:
        return with_segments(record) if record.study == "panoptic" else record

    both = make_run([semantic, panoptic_study(synthetic)], name="both", artifacts=False, change=change)
    text = report_files(both)["report.md"].decode()
    assert "0.5 mIoU and 0.5 PQ." in text
    assert "0.5 mIoU" not in report_files(folder)["report.md"].decode()
    assert "always the commonest class" in text


def test_the_overlay_has_a_row_per_arm_and_the_image(run: Path):
    [group] = accuracy_groups(load_run(run))
    picture = segment_overlay(run, group)
    assert picture is not None
    assert (picture.images, list(picture.arms), picture.seed) == (3, list(PQ), 0)
    canvas = np.array(Image.open(io.BytesIO(picture.png)).convert("RGB"))
    # two blocks a line: 2 lines of truth and three arms, tiles of 172x129
    assert canvas.shape[1] > 2 * 4 * 172
    assert canvas.shape[0] > 2 * 4 * 129
    image = np.array(Image.open(run / "artifacts" / "scenes" / "00" / "image.png").resize((172, 129), Image.Resampling.LANCZOS)).astype(int)
    drawn = canvas[30 : 30 + 129, 26 : 26 + 172].astype(int)
    assert np.abs(drawn - image).mean() == 0
    assert picture.png == segment_overlay(run, group).png


def test_results_of_another_size_are_named(run: Path):
    [group] = accuracy_groups(load_run(run))
    path = next((run / "artifacts" / "predictions").glob("*/01_instances.png"))
    Image.new("RGB", (5, 4)).save(path)
    with pytest.raises(UsageError, match=r"01_instances.png is 5x4, its truth is 128x96; delete the artifacts and run again"):
        segment_overlay(run, group)


def test_without_kept_segments_there_is_no_overlay(run: Path):
    [group] = accuracy_groups(load_run(run))
    for path in (run / "artifacts").rglob("truth_panoptic.png"):
        path.unlink()
    assert segment_overlay(run, group) is None
