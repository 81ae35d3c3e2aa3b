from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from PIL import Image

import emca_bench
from emca_bench.errors import UsageError
from emca_bench.report.build import render
from emca_bench.report.numbers import TIMES

SECTIONS = [
    "Conditions",
    "Paper claims",
    "Cross-attention alone",
    "Multiply-adds",
    "Frames per second",
    "Accuracy",
    "Qualitative results",
    "Failed, impossible and missing cells",
    "How each row was produced",
    "Method notes",
]


def headings(text: str) -> list[str]:
    return re.findall(r"^## (.*)$", text, re.MULTILINE)


def files_below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def table_after(text: str, start: str) -> list[list[str]]:
    """Cells of the first Markdown table after a line of text."""
    lines = text[text.index(start) :].splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


def test_sections_come_in_order(full_report):
    assert headings((full_report / "report.md").read_text()) == SECTIONS


def test_html_holds_every_section_and_a_list_of_contents(full_report):
    text = (full_report / "report.html").read_text()
    assert re.findall(r"<h2 id=\"[^\"]+\">([^<]+)</h2>", text) == SECTIONS
    targets = re.findall(r'<a href="#([^"]+)">', text)
    assert len(targets) == len(SECTIONS)
    assert all(f'id="{target}"' in text for target in targets)


def test_another_process_renders_the_same_bytes_elsewhere_and_without_torch(full_run, full_report, tmp_path):
    program = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'timm', 'torchvision', 'emca_kernels'): raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from pathlib import Path\n"
        "from emca_bench.report.build import render\n"
        "render(Path(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    paths = os.pathsep.join([str(Path(emca_bench.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-c", program, str(full_run), str(tmp_path / "out")], check=True, env=environment)
    assert files_below(tmp_path / "out") == files_below(full_report)


def test_nothing_tells_where_it_was_rendered(full_run, full_report):
    for name in ("report.md", "report.html", "summary.json"):
        text = (full_report / name).read_text()
        assert str(full_run.parent) not in text
        assert str(full_report) not in text


def test_figures_are_svg_and_png_without_dates(full_report):
    names = {path.stem for path in (full_report / "figures").glob("*.svg")}
    assert {"attention-attention-1", "macs", "speed-fps", "accuracy-scenes-1", "pareto-scenes-1", "loss-camvid-2"} <= names
    for name in names:
        svg = (full_report / "figures" / f"{name}.svg").read_text()
        assert "<dc:date>" not in svg
        assert "Matplotlib" not in svg
        with Image.open(full_report / "figures" / f"{name}.png") as image:
            assert image.width > 1000
            assert "Software" not in image.info


class _Loads(HTMLParser):
    """Everything that a browser would fetch, and whether tags nest."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.sources += [
            value for name, value in attrs if name in ("src", "srcset", "poster", "data") or (tag == "link" and name == "href")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_html_is_well_formed_and_loads_nothing(full_report):
    text = (full_report / "report.html").read_text()
    parser = _Loads()
    parser.feed(text)
    assert parser.open == []
    assert parser.sources
    assert all(source.startswith("data:image/") for source in parser.sources)
    assert "@import" not in text
    assert not re.search(r"url\(", text)


def test_markdown_tables_are_well_formed(full_report):
    text = (full_report / "report.md").read_text()
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    tables = sum(token.type == "table_open" for token in tokens)
    assert tables == len(re.findall(r"^\| (---|---:)", text, re.MULTILINE)) > 10
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1


def test_markdown_links_only_files_that_were_written(full_report):
    links = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (full_report / "report.md").read_text())
    assert len(links) == len(set(links)) == 13
    assert all((full_report / link).is_file() for link in links)


def test_attention_table_has_a_row_per_size_and_arm(full_report, synthetic):
    rows = table_after((full_report / "report.md").read_text(), "## Cross-attention alone")
    assert rows[0][:5] == ["Pixels", "Arm", "GMACs", "ms [95 %]", "vs masked"]
    assert len(rows) - 2 == 6 * len(synthetic.ATTENTION_ARMS)


def test_summary_agrees_with_the_report(full_report):
    summary = json.loads((full_report / "summary.json").read_text())
    text = (full_report / "report.md").read_text()
    assert summary["measurements"] == {"ok": 278, "partial": 0, "failed": 0, "impossible": 0, "not run": 0}
    assert summary["answer"][:60] in text
    assert {claim["verdict"] for claim in summary["claims"]} <= {"reproduced", "differs", "undecided", "not comparable", "not run"}
    row = next(row for row in summary["attention"] if row["arm"] == "emca" and row["params"]["pixels"] == "128x256")
    assert row["speedup"]["masked_fused"]["verdict"] == "faster"
    assert [entry["against"] for entry in summary["crossovers"]] == ["masked", "masked_fused"]


def test_accuracy_shows_floors_and_whether_the_data_can_tell(full_report):
    text = (full_report / "report.md").read_text()
    section = text[text.index("### scenes") : text.index("### camvid")]
    assert "scenes can tell cross-attentions apart" in section
    arms = [row[0] for row in table_after(section, "### scenes")]
    assert "`none` (floor)" in arms
    assert "`mask_pooling`" in arms
    assert arms[-1] == "always the commonest class"


def test_a_blind_data_set_is_called_blind(make_run, synthetic):
    study = replace(synthetic.accuracy_study(), axes={"dataset": ("camvid",), "seed": (0, 1, 2, 3)})

    def flatten(record):
        return replace(record, values={**record.values, "miou": 55 + record.params["seed"] + 0.01 * len(record.arm)})

    text = render(make_run([study], change=flatten, artifacts=False)).markdown_path.read_text()
    assert "camvid cannot decide" in text
    assert "not worse\\*" in text


def test_quick_runs_say_so_and_decide_nothing(make_run, synthetic):
    report = render(make_run([synthetic.quick(study) for study in synthetic.all_studies()]))
    text = report.markdown_path.read_text()
    assert text.split("\n\n")[1].startswith("This is a quick run")
    assert "(faster)" not in text.split("\n\n")[1]
    verdicts = {row["verdict"] for row in json.loads(report.summary_path.read_text())["claims"]}
    assert verdicts == {"not comparable", "undecided"}
    assert " faster |" not in text
    assert " not worse |" not in text
    assert "`emca-bench run attention --quick --only arm=masked --only pixels=16x16`" in text


@pytest.mark.parametrize("name", ["attention", "flops", "fps", "accuracy"])
def test_a_run_of_one_study_renders_and_says_what_is_missing(make_run, synthetic, name):
    study = next(study for study in synthetic.all_studies() if study.name == name)
    text = render(make_run([study])).markdown_path.read_text()
    expected = [section for section in SECTIONS if section != "Qualitative results" or name == "accuracy"]
    assert headings(text) == expected
    absent = {
        "attention": "plans no latency of the cross-attention",
        "flops": "plans no counts",
        "fps": "plans no latency of decoders",
        "accuracy": "plans no training",
    }
    assert [key for key, words in absent.items() if words not in text] == [name]


def test_a_run_without_records_renders(make_run):
    text = render(make_run(change=lambda record: None, artifacts=False)).markdown_path.read_text()
    assert "Nothing has been measured yet: 0 of 278" in text
    assert "278 planned measurements not run" in text


def test_a_part_of_a_study_renders_without_its_baselines(make_run, synthetic):
    parts = [study.only({"arm": "emca"}) for study in synthetic.all_studies()]
    text = render(make_run([replace(part, expected=()) for part in parts])).markdown_path.read_text()
    assert "hold no published claims" in text
    assert "`masked`" not in text


def test_one_size_and_one_round_render(make_run, synthetic):
    study = replace(synthetic.attention_study(), axes={"pixels": ("64x64",)})
    text = render(make_run([study], change=lambda record: record if record.round == 0 else None)).markdown_path.read_text()
    assert "1 of 7 rounds" in text


def test_failed_and_impossible_cells_are_visible_with_reasons(make_run, synthetic):
    def break_some(record):
        if record.measure == "latency" and record.arm == "emca_soft":
            return replace(record, status="failed", reason="Triton: shared | memory <exceeded>\nsecond line", samples={}, values={})
        if record.measure == "latency" and record.arm == "pem_ca":
            return replace(record, status="impossible", reason="K > P", samples={}, values={})
        return record

    report = render(make_run([synthetic.attention_study()], change=break_some))
    text = report.markdown_path.read_text()
    rows = table_after(text, "## Failed")
    assert {row[3] for row in rows[2:]} == {"failed", "impossible"}
    assert "Triton: shared \\| memory \\<exceeded\\> second line" in text
    assert "memory &lt;exceeded&gt;" in report.html_path.read_text()
    failed = [row for row in table_after(text, "## Cross-attention alone") if row[1] == "`emca_soft`"]
    assert all(row[3] == "failed" for row in failed)


def test_a_dirty_tree_and_a_busy_machine_are_pointed_out(make_run, synthetic):
    state = {**synthetic.ENVIRONMENT["state"], "git_dirty": True, "load_average": 7.5}
    folder = make_run([synthetic.flops_study()], environment={**synthetic.ENVIRONMENT, "state": state})
    text = render(folder).markdown_path.read_text()
    assert "uncommitted changes" in text
    assert "load average 7.5 on 2 cores" in text


def test_latencies_in_scheduler_ticks_are_pointed_out(make_run, synthetic):
    def quantise(record):
        if record.measure != "latency":
            return record
        return replace(record, samples={"latency_ms": [4.0 * (1 + round(sample)) for sample in record.samples["latency_ms"]]})

    report = render(make_run([synthetic.attention_study()], change=quantise))
    assert "Latencies of attention are multiples of the scheduler tick (4 ms)" in report.markdown_path.read_text().split("## ")[0]
    assert json.loads(report.summary_path.read_text())["scheduler_tick_ms"] == {"attention": 4.0}


def test_several_settings_get_a_figure_each(make_run, synthetic):
    study = synthetic.attention_study()
    fixed = {name: value for name, value in study.fixed.items() if name != "dtype"}
    study = replace(study, fixed=fixed, axes={"pixels": ("16x16", "32x32"), "dtype": ("float32", "bfloat16")}, expected=())
    report = render(make_run([study]))
    assert {path.name for path in (report.markdown_path.parent / "figures").glob("attention*.svg")} == {
        "attention-attention-1.svg",
        "attention-attention-2.svg",
    }


def test_overlays_show_every_arm(full_report, synthetic):
    with Image.open(full_report / "figures" / "overlay-scenes-1.png") as image:
        columns = 1 + len(synthetic.accuracy_study().arms)
        assert image.width == 8 + columns * 248


def test_overlays_need_truth_and_prediction_of_one_size(make_run, synthetic):
    folder = make_run([synthetic.accuracy_study()])
    path = next((folder / "artifacts" / "predictions").glob("*/00.png"))
    Image.new("L", (5, 4)).save(path)
    with pytest.raises(UsageError, match="is 5x4, its truth is 128x96"):
        render(folder)


def test_a_broken_class_list_is_named(make_run, synthetic):
    folder = make_run([synthetic.accuracy_study()])
    (folder / "artifacts" / "scenes" / "classes.json").write_text('[{"name": "sky"}]')
    with pytest.raises(UsageError, match=r"classes\.json is no list of classes"):
        render(folder)


def test_an_unwritable_target_is_a_usage_error(make_run, synthetic, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        render(make_run([synthetic.flops_study()]), tmp_path / "taken")


def test_both_counters_stand_side_by_side_where_both_were_recorded(make_run, synthetic):
    def change(record):
        if record.measure != "macs" or record.arm != "masked":
            return record
        rules = {"macs": record.values["macs"] + 5_000_000, "components": {}, "added": {"native_layer_norm": 15_000_000}}
        return replace(record, values={**record.values, "fvcore": {**rules, "dropped": {"baddbmm": 10_000_000}}})

    folder = make_run([synthetic.flops_study()], change=change)
    text = render(folder).markdown_path.read_text()
    rows = table_after(text, "Beside fvcore")[2:]
    assert {row[0] for row in rows} == {"`masked`"}
    assert {tuple(row[4:]) for row in rows} == {("native_layer_norm 0.0150", "baddbmm 0.0100")}
    counts = json.loads((folder / "summary.json").read_text())["counts"]
    assert {"fvcore_macs" in entry for entry in counts if entry["arm"] == "masked"} == {True}
    assert not any("fvcore_macs" in entry for entry in counts if entry["arm"] != "masked")


def test_without_fvcore_s_count_there_is_no_table_of_it(make_run, synthetic):
    assert "fvcore" not in render(make_run([synthetic.flops_study()])).markdown_path.read_text()


def test_the_first_paragraph_is_about_emca_on_the_largest_images(make_run, synthetic):
    """Whatever studies come before or after, smaller images and rivals without EMCA are not what a run is about."""
    fps = replace(synthetic.fps_study(), expected=())
    large = replace(fps, name="large", axes={"scope": ("end_to_end",), "image_size": ("1024x2048",)})
    rivals = [arm for arm in fps.arms if arm.attention != "emca"]
    without = replace(fps, name="without", arms=tuple(rivals), axes={"scope": ("end_to_end",), "image_size": ("1024x2048",)})
    folder = make_run([large, fps, without])
    render(folder, folder)
    said = (folder / "report.md").read_text().split("\n")[2]
    assert f"End to end (mask2former_lite0, 1024{TIMES}2048): EMCA (folded) runs at " in said
