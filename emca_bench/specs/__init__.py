"""Study files: what is measured, over which axes, against which published claims.

A study is a TOML file in `ablations/`; this package turns it into frozen dataclasses and expands it into cells. Standard library only.
"""

from emca_bench.specs.files import find_study, study_folders
from emca_bench.specs.lock import dump_lock, load_lock
from emca_bench.specs.parameters import (
    CEILINGS,
    MASKS,
    MEASURES,
    MODEL_SCOPES,
    PARAMETERS,
    RECIPE_NUMBERS,
    REQUIRED,
    TIMED_MODEL_SCOPES,
    Value,
    parse_size,
)
from emca_bench.specs.reading import load_studies
from emca_bench.specs.study import COST_SUFFIX, SCHEMA, Arm, Cell, Expected, Settings, Study, Target, canonical_json

__all__ = [
    "CEILINGS",
    "COST_SUFFIX",
    "MASKS",
    "MEASURES",
    "MODEL_SCOPES",
    "PARAMETERS",
    "RECIPE_NUMBERS",
    "REQUIRED",
    "SCHEMA",
    "TIMED_MODEL_SCOPES",
    "Arm",
    "Cell",
    "Expected",
    "Settings",
    "Study",
    "Target",
    "Value",
    "canonical_json",
    "dump_lock",
    "find_study",
    "load_lock",
    "load_studies",
    "parse_size",
    "study_folders",
]
