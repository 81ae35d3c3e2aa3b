"""Choosing tile sizes, as far as it needs no device."""

from __future__ import annotations

import pytest
import torch
from emca_kernels.triton import tune
from emca_kernels.triton.configs import TABLE, Config, config_of, format_tables, parse_tables, tables

PRESENT = Config(block_q=128, block_p=64, resident=256, piece=64, num_warps=8, num_stages=3)


def test_the_table_is_written_as_it_was_read() -> None:
    assert format_tables(parse_tables(TABLE.read_text())) == TABLE.read_text()


def test_every_operator_has_entries_for_both_architectures_and_widths() -> None:
    for operator, table in tables().items():
        scopes = {scope for _, _, scope in table}
        assert {"plain", "embedding", "embedding+position"} <= scopes
        for architecture in (80, 90):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                assert all(config_of(operator, architecture, dtype, scope).piece for scope in scopes)


def test_tiles_hold_whole_words_of_packed_masks() -> None:
    for table in tables().values():
        assert all(config.block_p % 32 == 0 for (_, _, scope), config in table.items() if not scope.startswith("embedding"))


def test_candidates_differ_in_one_size_and_stay_within_what_kernels_take() -> None:
    for table in tables().values():
        for present in table.values():
            found = list(tune.candidates(present))
            assert found[0] == present
            assert len(set(found)) == len(found) >= 4
            for other in found[1:]:
                assert sum(getattr(other, name) != getattr(present, name) for name in Config.__dataclass_fields__) == 1
                assert other.block_p >= 32 or other.block_p == present.block_p
                assert other.num_stages >= 1


def test_only_a_clear_gain_displaces_the_present_entry() -> None:
    one, two = list(tune.candidates(PRESENT))[1:3]
    assert tune.fastest({PRESENT: 1.0, one: 0.99, two: 1.2}, PRESENT) == PRESENT
    assert tune.fastest({PRESENT: 1.0, one: 0.97, two: 0.9}, PRESENT) == two
    assert tune.fastest({one: 5.0}, PRESENT) == one
    assert tune.fastest({}, PRESENT) == PRESENT


def test_a_candidate_that_does_not_run_is_left_out_and_the_table_stays(capsys: pytest.CaptureFixture[str]) -> None:
    key = (90, "half", "plain")
    present = tables()["select_prototypes"][key]

    def call() -> int:
        return tables()["select_prototypes"][key].num_stages

    def time(timed: object) -> float:
        if call() > present.num_stages:
            raise RuntimeError("out of resource: shared memory")
        return float(call())

    found = tune.try_all("select_prototypes", key, present, time, call)
    assert tables()["select_prototypes"][key] == present
    assert tune.fastest(found, present).num_stages == present.num_stages - 1
    assert all(config.num_stages <= present.num_stages for config in found)
    assert "out of resource" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    before = TABLE.read_text()
    assert tune.main(["--write"]) == 2
    assert "nothing to tune on" in capsys.readouterr().err
    assert TABLE.read_text() == before


def test_the_masks_it_tries_have_values() -> None:
    features = torch.empty(2, 64, 8)
    mask = tune.filled_mask("bool", features)
    assert mask is not None
    assert 0 < mask.allowed().float().mean() < 1
    assert tune.filled_mask("embedding", features) is not None
