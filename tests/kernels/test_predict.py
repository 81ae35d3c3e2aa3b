"""The model that predicts times on a GPU, against arithmetic by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from emca_kernels.predict import Machine, fused_s, layer_s, main, masked_s, selection_s, table
from emca_kernels.specs import Sizes

SIXTEEN = Sizes(batch=16, pixels=32768, queries=100, width=256, itemsize=2)


def test_selection_is_bound_by_one_read_of_features_and_mask() -> None:
    machine = Machine(bandwidth=4e12, copy_efficiency=1.0, launch_s=1e-6)
    features, queries, mask, results = 16 * 32768 * 512, 16 * 100 * 512, 16 * 100 * 32768, 16 * 100 * (8 + 2)
    assert selection_s(SIXTEEN, machine) == pytest.approx(2e-6 + (features + queries + mask + results) / 4e12)


def test_slow_tensor_cores_bound_it_instead_padding_included() -> None:
    machine = Machine(tensor_rate=1e14, tensor_efficiency=0.5, launch_s=1e-6)
    assert selection_s(SIXTEEN, machine) == pytest.approx(2e-6 + 2 * 16 * 32768 * 128 * 256 / 5e13)


def test_a_small_call_is_its_launches() -> None:
    small = Sizes(batch=1, pixels=16, queries=100, width=256, itemsize=2)
    assert selection_s(small, Machine()) == pytest.approx(2 * Machine().launch_s, rel=0.05)


def test_the_layer_lies_between_its_selection_and_masked_attention() -> None:
    machine = Machine()
    assert selection_s(SIXTEEN, machine) < layer_s(SIXTEEN, machine) < fused_s(SIXTEEN, machine) < masked_s(SIXTEEN, machine)


def test_the_table_says_that_nothing_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--bandwidth", "3.35"])
    said = capsys.readouterr().out
    assert said.startswith("Predicted, not measured")
    assert "bandwidth=3350000000000" in said
    assert "| 16 | 128x256 |" in said


def test_the_readme_shows_this_table() -> None:
    assert table(Machine()) in (Path(__file__).parents[2] / "kernels" / "README.md").read_text()


@pytest.mark.parametrize("arguments", [["--bandwidth", "0"], ["--launch", "-1"], ["--tensor-rate", "nan"]])
def test_a_machine_of_nothing_is_an_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert "expected a number above zero" in capsys.readouterr().err
