from __future__ import annotations

import json
from pathlib import Path

import pytest

from emca_bench.errors import UsageError
from emca_bench.specs import PARAMETERS, REQUIRED, dump_lock, find_study, load_lock, load_studies, parse_size, study_folders

MINIMAL = """
[study]
name = "small"
title = "Small"
question = "?"
measures = ["macs"]
baselines = ["masked"]

[fixed]
scope = "attention"
batch = 1
queries = 10
width = 32

[axes]
arm = ["masked", "wide"]
pixels = ["4x4", "8x8"]

[arms.wide]
attention = "emca"
heads = 2

[quick.axes]
pixels = ["4x4"]
"""


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(MINIMAL)
    return path


def edited(path: Path, old: str, new: str) -> Path:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


def test_cells_are_the_product_of_the_axes_with_arms_side_by_side(study_file: Path):
    (study,) = load_studies(study_file)
    assert [(cell.arm.name, cell.params["pixels"]) for cell in study.cells()] == [
        ("masked", "4x4"),
        ("wide", "4x4"),
        ("masked", "8x8"),
        ("wide", "8x8"),
    ]
    assert study.arms[1].attention == "emca"
    assert study.arms[1].switches == {"heads": 2}


def test_quick_replaces_what_it_names(study_file: Path):
    (study,) = load_studies(study_file, quick=True)
    assert study.quick
    assert {cell.params["pixels"] for cell in study.cells()} == {"4x4"}


def test_every_cell_and_measure_has_its_own_key(study_file: Path):
    (study,) = load_studies(study_file)
    keys = {cell.key(measure) for cell in study.cells() for measure in ("macs", "latency")}
    assert len(keys) == 2 * len(study.cells())


@pytest.mark.parametrize(
    ("old", "new"),
    [("batch = 1", "batch = 2"), ("heads = 2", "heads = 4"), ('question = "?"', 'question = "?"\nmethod = 2')],
    ids=["parameter", "switch", "method"],
)
def test_keys_change_with_what_is_measured(study_file: Path, old: str, new: str):
    before = {cell.key("macs") for cell in load_studies(study_file)[0].cells()}
    after = {cell.key("macs") for cell in load_studies(edited(study_file, old, new))[0].cells()}
    assert before != after


def test_keys_do_not_change_with_words(study_file: Path):
    before = [cell.key("macs") for cell in load_studies(study_file)[0].cells()]
    after = [cell.key("macs") for cell in load_studies(edited(study_file, 'title = "Small"', 'title = "Other"'))[0].cells()]
    assert before == after


def test_an_arm_that_overrides_an_axis_has_one_cell_along_it(study_file: Path):
    (study,) = load_studies(edited(study_file, "heads = 2", 'heads = 2\npixels = "16x16"'))
    assert [(cell.arm.name, cell.params["pixels"]) for cell in study.cells()] == [("masked", "4x4"), ("wide", "16x16"), ("masked", "8x8")]


def test_lock_file_gives_the_same_cells_back(study_file: Path, tmp_path: Path):
    studies = load_studies(study_file)
    lock = tmp_path / "lock.json"
    lock.write_text(dump_lock(studies))
    again = load_lock(lock)
    assert [cell.key("macs") for cell in again[0].cells()] == [cell.key("macs") for cell in studies[0].cells()]
    assert again == studies


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[axes]", "[axis]", ["'axis'", "did you mean 'axes'"]),
        ("measures =", "measure =", ["'measure'", "did you mean 'measures'"]),
        ('["macs"]', '["mac"]', ["'mac'", "did you mean 'macs'"]),
        ("queries = 10", "querys = 10", ["'querys'", "did you mean 'queries'"]),
        ("queries = 10", 'queries = "ten"', ["'queries'", "int", "'ten'"]),
        ("queries = 10", 'queries = 10\ntask = "panoptik"', ["'panoptik'", "did you mean 'panoptic'"]),
        ("queries = 10", "queries = 10\nobject_threshold = 1.5", ["'object_threshold'", "0..1", "1.5"]),
        ("queries = 10", "queries = true", ["'queries'", "int", "True"]),
        ('scope = "attention"', 'scope = "atention"', ["'atention'", "did you mean 'attention'"]),
        ('"8x8"]', '"8by8"]', ["'8by8'", "HEIGHTxWIDTH"]),
        ('"8x8"]', '"4x4"]', ["'pixels'", "twice"]),
        ('["4x4", "8x8"]', "[]", ["'pixels'", "at least one"]),
        ('arm = ["masked", "wide"]', 'arm = ["wide", "wide"]', ["distinct"]),
        ('baselines = ["masked"]', 'baselines = ["maskd"]', ["'maskd'", "did you mean 'masked'"]),
        ("width = 32", "", ["width"]),
        ('scope = "attention"', "", ["scope"]),
        ('pixels = ["4x4", "8x8"]\n\n[arms', 'pixels = ["4x4", "8x8"]\nbatch = [1, 2]\n\n[arms', ["batch", "[axes]", "[fixed]"]),
        ('name = "small"', 'name = "../x"', ["'../x'"]),
        ("[quick.axes]", "[quick.axis]", ["'axis'", "did you mean 'axes'"]),
        ("[quick.axes]", "[settings]\nrounds = 0\n[quick.axes]", ["rounds"]),
        ("[quick.axes]", "[settings]\nround = 3\n[quick.axes]", ["'round'", "did you mean 'rounds'"]),
        ("[study]", "[study", ["not valid TOML"]),
        ("[arms.wide]", "[arms.wid]", ["'wid'", "did you mean 'wide'", "[arms]"]),
        (
            "[quick.axes]",
            '[[expected]]\nclaim = "c"\nmetric = "sped"\nvalue = 1\narm = "masked"\nsource = "s"\n[quick.axes]',
            ["'sped'", "did you mean 'speedup'"],
        ),
        *(
            ("[quick.axes]", f'[[expected]]\nclaim = "c"\nmetric = "speedup"\nvalue = 1\nsource = "s"\n{wrong}\n[quick.axes]', words)
            for wrong, words in [
                ('arm = "wid"\nagainst = ["masked"]', ["'wid'", "did you mean 'wide'"]),
                ('arm = "wide"\nagainst = ["maskd"]', ["'maskd'", "did you mean 'masked'"]),
                ('arm = "wide"\nagainst = ["masked"]\nwhere = { pixels = 64 }', ["'pixels'", "must be str", "64"]),
            ]
        ),
        ("[quick.axes]", '[[expected]]\nclaim = "c"\nmetric = "speedup"\narm = "masked"\nsource = "s"\n[quick.axes]', ["'c'", "value"]),
    ],
)
def test_errors_name_the_file_the_key_and_what_was_expected(study_file: Path, old: str, new: str, words: list[str]):
    with pytest.raises(UsageError) as error:
        load_studies(edited(study_file, old, new))
    for word in [*words, study_file.name]:
        assert word in str(error.value)


def test_only_narrows_and_names_what_it_does_not_find(study_file: Path):
    (study,) = load_studies(study_file)
    assert [cell.params["pixels"] for cell in study.only({"arm": "wide", "pixels": "8x8"}).cells()] == ["8x8"]
    for conditions, word in (
        ({"arm": "wid"}, "did you mean 'wide'"),
        ({"pixels": "9x9"}, "4x4"),
        ({"pixel": "4x4"}, "did you mean 'pixels'"),
    ):
        with pytest.raises(UsageError, match=word):
            study.only(conditions)


def test_union_holds_its_neighbours_in_their_quick_form(study_file: Path):
    union = study_file.with_name("both.toml")
    union.write_text('[study]\nname = "both"\ntitle = "B"\nquestion = "?"\nunion = ["small"]\nquick = true\n')
    (study,) = load_studies(union)
    assert study.name == "small"
    assert study.quick


def test_missing_study_is_named_with_its_near_name():
    with pytest.raises(UsageError, match="did you mean"):
        find_study("atention")
    with pytest.raises(UsageError, match=r"nowhere\.toml"):
        load_studies(Path("nowhere.toml"))


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("path", sorted(study_folders()[-1].glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_studies_are_valid(path: Path, quick: bool):
    for study in load_studies(path, quick=quick):
        assert study.cells()
        assert all(len(arm.name) <= len("masked_exact_rewrites") for arm in study.arms)
        for target in () if quick else study.targets:
            assert any(cell.params.items() >= target.where.items() for cell in study.cells() if cell.arm.name == target.arm)
        for expected in study.expected:
            arms = {arm.name for arm in study.arms}
            assert {expected.arm, *expected.against} <= arms
            assert any(all(cell.params.get(name) == value for name, value in expected.where.items()) for cell in study.cells())


TARGET = """
[[target]]
target = "Wide is fast"
metric = "speedup"
arm = "wide"
against = ["masked"]
at_least = 2
where = { pixels = "8x8" }
"""


def test_targets_come_back_from_the_lock_and_locks_without_them_load(study_file: Path, tmp_path: Path):
    study_file.write_text(study_file.read_text() + TARGET)
    studies = load_studies(study_file)
    (target,) = studies[0].targets
    assert (target.at_least, target.at_most, target.against, target.where) == (2.0, None, ("masked",), {"pixels": "8x8"})
    lock = tmp_path / "lock.json"
    lock.write_text(dump_lock(studies))
    assert load_lock(lock) == studies
    older = json.loads(lock.read_text())
    del older["studies"][0]["targets"]
    lock.write_text(json.dumps(older))
    assert load_lock(lock)[0].targets == ()


def test_keys_do_not_change_with_targets(study_file: Path):
    before = [cell.key("macs") for cell in load_studies(study_file)[0].cells()]
    study_file.write_text(study_file.read_text() + TARGET)
    assert [cell.key("macs") for cell in load_studies(study_file)[0].cells()] == before


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("at_least = 2", "at_leest = 2", ["'at_leest'", "did you mean 'at_least'"]),
        ("at_least = 2", "at_least = 2\nat_most = 3", ["'Wide is fast'", "either at_least or at_most"]),
        ("at_least = 2", 'at_least = "two"', ["'Wide is fast'", "'two'"]),
        ('metric = "speedup"', 'metric = "speed"', ["'speed'", "did you mean 'speedup'"]),
        ('arm = "wide"', 'arm = "wid"', ["'wid'", "did you mean 'wide'"]),
        ('against = ["masked"]', 'against = ["maskd"]', ["'maskd'", "did you mean 'masked'"]),
        ('{ pixels = "8x8" }', '{ pixel = "8x8" }', ["'pixel'", "did you mean 'pixels'"]),
        ("batch = 1", 'batch = 1\npass = "backward"', ["unknown pass 'backward'"]),
        ("batch = 1", 'batch = 1\npass = "forward_backward"', ["measures latency and memory only"]),
        ('scope = "attention"', 'scope = "kernel"', ["measures latency and memory only"]),
    ],
)
def test_targets_and_passes_that_make_no_sense_are_named(study_file: Path, old: str, new: str, words: list[str]):
    study_file.write_text(study_file.read_text() + TARGET)
    with pytest.raises(UsageError) as caught:
        load_studies(edited(study_file, old, new))
    assert all(word in str(caught.value) for word in ["small.toml", *words])


def test_an_operator_needs_its_name(study_file: Path):
    text = study_file.read_text().replace('["macs"]', '["latency"]').replace('scope = "attention"', 'scope = "kernel"')
    study_file.write_text(text)
    with pytest.raises(UsageError, match="scope 'kernel' needs parameter 'op'"):
        load_studies(study_file)


def test_required_parameters_exist():
    assert {name for names in REQUIRED.values() for name in names} <= set(PARAMETERS)


@pytest.mark.parametrize("text", ["", "8", "8x", "0x8", "8x8x8", "-8x8", "8 x 8"])
def test_sizes_of_another_form_are_refused(text: str):
    with pytest.raises(UsageError, match="HEIGHTxWIDTH"):
        parse_size(text)


COSTLY = """
[study]
name = "costly"
title = "Costly"
question = "?"
measures = ["accuracy"]
baselines = ["emca"]

[fixed]
scope = "end_to_end"
model = "mask2former_tiny"
dataset = "scenes"
image_size = "64x64"
batch = 8
steps = 4
frozen = true

[axes]
arm = ["emca", "wide"]
layers = [1, 3]
seed = [0, 1]

[arms.wide]
attention = "emca"
heads = 4
learning_rate = 1e-2

[cost.fixed]
batch = 1
classes = 10

[cost.settings]
rounds = 5

[quick.axes]
layers = [1]

[quick.cost.settings]
rounds = 2
"""


def test_a_table_of_costs_adds_a_study_of_the_same_arms(tmp_path: Path):
    path = tmp_path / "costly.toml"
    path.write_text(COSTLY)
    study, cost = load_studies(path)
    assert (study.name, cost.name) == ("costly", "costly-cost")
    assert cost.measures == ("macs", "latency", "memory")
    assert dict(cost.axes) == {"layers": (1, 3)}
    assert (cost.fixed["batch"], cost.fixed["classes"], cost.settings.rounds) == (1, 10, 5)
    assert not {"dataset", "steps", "seed", "frozen", "learning_rate"} & {name for cell in cost.cells() for name in cell.params}
    assert [arm.switches for arm in cost.arms] == [arm.switches for arm in study.arms]
    assert len(study.cells()) == 8
    assert len(cost.cells()) == 4
    part = [entry.only({"arm": "wide", "seed": "1", "layers": "3"}) for entry in (study, cost)]
    assert [len(entry.cells()) for entry in part] == [1, 1]
    assert load_studies(path, quick=True)[1].settings.rounds == 2
    lock = tmp_path / "study.lock.json"
    lock.write_text(dump_lock([study, cost]))
    assert load_lock(lock) == [study, cost]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("classes = 10\n", "", "needs parameter 'classes'"),
        ("[cost.settings]", "[cost.setings]", "unknown key of [cost] 'setings' (did you mean 'settings'?)"),
        ("batch = 1\n", "batc = 1\n", "unknown parameter 'batc' (did you mean 'batch'?)"),
    ],
)
def test_wrong_tables_of_costs_are_named(tmp_path: Path, old: str, new: str, words: str):
    path = tmp_path / "costly.toml"
    path.write_text(COSTLY.replace(old, new))
    with pytest.raises(UsageError) as caught:
        load_studies(path)
    assert words in str(caught.value)


def test_a_study_like_another_has_its_tables_and_its_own(tmp_path: Path):
    (tmp_path / "costly.toml").write_text(COSTLY)
    path = tmp_path / "other.toml"
    path.write_text('[study]\nlike = "costly"\nname = "other"\n[fixed]\nlayers = 2\n[axes]\nsteps = [4, 8]\n[arms.wide]\nheads = 8\n')
    study, cost = load_studies(path)
    assert (study.name, study.title, cost.name) == ("other", "Costly", "other-cost")
    assert study.fixed["layers"] == 2
    assert "steps" not in study.fixed
    assert dict(study.axes) == {"steps": (4, 8), "seed": (0, 1)}
    assert study.arms[1].switches == {"heads": 8}
    assert study.arms[1].overrides == {"learning_rate": 1e-2}
    path.write_text('[study]\nlike = "other"\nname = "other"\n')
    with pytest.raises(UsageError, match=r"'like' in \[study\] must name another study"):
        load_studies(path)
