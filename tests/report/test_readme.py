from __future__ import annotations

import pytest

from emca_bench.errors import UsageError
from emca_bench.report.build import render
from emca_bench.report.check import stale_files
from emca_bench.report.load import load_run
from emca_bench.report.readme import readme_block, update_blocks, update_readme

TEXT = "# T\n\n<!-- emca:begin one -->\nold\n<!-- emca:end one -->\n\nkept\n"


def test_text_between_markers_is_replaced_and_nothing_else():
    assert update_blocks(TEXT, {"one": "new\nlines\n"}) == TEXT.replace("old\n", "new\nlines\n")


def test_updating_twice_changes_nothing_more():
    once = update_blocks(TEXT, {"one": "new"})
    assert update_blocks(once, {"one": "new"}) == once


def test_an_empty_block_is_filled():
    text = "<!-- emca:begin one -->\n<!-- emca:end one -->"
    assert update_blocks(text, {"one": "new"}) == "<!-- emca:begin one -->\nnew\n<!-- emca:end one -->"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (TEXT.replace("end one", "end onne"), r"line 5: unknown block 'onne' \(did you mean 'one'\?\)"),
        (TEXT.replace("<!-- emca:end one -->\n", ""), "'one' is never closed"),
        (TEXT.replace("<!-- emca:begin one -->\n", ""), "line 4: block 'one' ends where none is open"),
        (TEXT + TEXT, "line 10: block 'one' stands here a second time"),
        (TEXT.replace("old", "<!-- emca:begin two -->"), "block 'two' begins inside of 'one'"),
        ("no markers", "no markers for one, two"),
    ],
)
def test_markers_that_do_not_fit_are_named(text, match):
    with pytest.raises(UsageError, match=match):
        update_blocks(text, {"one": "", "two": ""} if "two" in match or "two" in text else {"one": ""})


def test_headline_table_has_a_row_per_known_arm_and_its_conditions(full_run):
    block = readme_block(load_run(full_run))
    rows = [line.split(" | ")[0].removeprefix("| ") for line in block.splitlines() if line.startswith("| ")]
    words = ["masked (as published)", "masked (fused)", "EMCA as written", "EMCA (folded)", "EMCA soft", "mask pooling", "none"]
    assert rows[2:] == words
    conditions = block.splitlines()[-1]
    for part in (
        "AMD EPYC 9B14, 2 threads",
        "torch 2.13.0",
        "128\N{MULTIPLICATION SIGN}256 pixels",
        "float32",
        "`emca-bench run reproduce`",
    ):
        assert part in conditions


def test_headline_of_a_quick_run_says_so(make_run, synthetic):
    block = readme_block(load_run(make_run([synthetic.quick(synthetic.attention_study())])))
    assert "quick run, not to be cited" in block
    assert "(undecided)" in block


def test_headline_of_an_unmeasured_run(make_run):
    assert readme_block(load_run(make_run(change=lambda record: None))) == "Nothing has been measured yet."


def test_headline_with_accuracy_alone(make_run, synthetic):
    block = readme_block(load_run(make_run([synthetic.accuracy_study()])))
    assert block.startswith("| Cross-attention | mIoU on scenes | mIoU on camvid |")


def test_speed_and_accuracy_may_come_from_two_runs(make_run, synthetic):
    speed, trained = load_run(make_run([synthetic.attention_study()])), load_run(make_run([synthetic.accuracy_study()]))
    block = readme_block(speed, trained)
    head = next(line for line in block.splitlines() if line.startswith("| Cross-attention"))
    assert "GMACs" in head
    assert "mIoU on camvid" in head
    assert block.splitlines()[2].count("|") == head.count("|")
    assert "accuracies: `" in block.splitlines()[-1]


def test_update_readme_and_check_agree(make_run, synthetic, tmp_path):
    folder = make_run([synthetic.flops_study()])
    render(folder)
    readme = tmp_path / "README.md"
    readme.write_text("# T\n<!-- emca:begin headline -->\n<!-- emca:end headline -->\n")
    assert stale_files(folder, folder, readme=readme) == [readme]
    update_readme(readme, folder)
    assert stale_files(folder, folder, readme=readme) == []


def test_check_names_edited_and_missing_files(make_run, synthetic):
    folder = make_run([synthetic.flops_study()])
    report = render(folder)
    report.markdown_path.write_text("edited")
    (folder / "figures" / "macs.png").unlink()
    assert set(stale_files(folder, folder)) == {folder / "report.md", folder / "figures" / "macs.png"}


def test_readme_errors_name_the_file(full_run, tmp_path):
    readme = tmp_path / "README.md"
    with pytest.raises(UsageError, match=r"README\.md cannot be read"):
        update_readme(readme, full_run)
    readme.write_text("<!-- emca:begin headlime -->\n<!-- emca:end headlime -->\n")
    with pytest.raises(UsageError, match=r"README.md: line 1: unknown block 'headlime'.*'headline'"):
        update_readme(readme, full_run)
