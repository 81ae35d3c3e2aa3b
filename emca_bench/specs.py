"""Study files: what is measured, over which axes, against which published claims.

A study is a TOML file in `ablations/`; this module turns it into frozen dataclasses and expands it into cells. Standard library only.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from emca_bench.errors import UsageError, did_you_mean, listing

SCHEMA = 1
"""Version of the record and key format; records of another schema are never mixed in."""

SCOPES = ("kernel", "attention", "decoder", "model", "end_to_end", "training_step")
"""kernel: one call of an operator, or of a ceiling. attention: one cross-attention call. decoder: mask decoder on given features.
model: images to predictions. end_to_end: images to label maps. training_step: images and truth to the gradients of all losses."""

MODEL_SCOPES = ("decoder", "model", "end_to_end")
"""Scopes that call a model or its mask decoder."""

TIMED_MODEL_SCOPES = (*MODEL_SCOPES, "training_step")
"""Those, and the one that trains a model, whose multiply-adds are not counted."""

TASKS = ("semantic", "panoptic")
"""semantic: one mask per class; mIoU. panoptic: one mask per segment; PQ, and AP and mIoU of the same model."""

PASSES = ("forward", "forward_backward")
"""forward: results alone. forward_backward: and the gradients, as a training step needs them."""

MASKS = ("none", "bool")
"""Kinds of mask of an operator: none allows everything; bool [B, Q, P], true for a random share `allowed`."""

RUNTIMES = ("eager", "optimized", "compiled", "cuda_graph", "onnxruntime", "transformers")
"""What runs a model. eager: torch, as the model is built. optimized: `emca_bench.optimize`. compiled: the same through torch.compile.
cuda_graph: the same, recorded once and replayed. onnxruntime: exported. transformers: Hugging Face's Mask2Former with the same weights,
and its own way to label maps."""

CEILINGS = ("burst", "matmul", "copy", "read")
"""Operators that are no contenders but bounds: multiply-adds in registers, a large matrix product; a large copy, a large sum."""

MEASURES = ("macs", "latency", "memory", "accuracy", "mechanism")

NEEDS = ("one", "mean", "modes", "apart")
"""What a generated task asks a cross-attention to find: one marked pixel, the mean of the mask, several marked pixels, two told apart."""

Value = str | int | float | bool

PARAMETERS: dict[str, tuple[type, str]] = {
    "scope": (str, f"what is measured: {', '.join(SCOPES)}"),
    "device": (str, "cpu or cuda"),
    "dtype": (str, "float32, bfloat16, float16 or float64"),
    "batch": (int, "images per call; with measure accuracy: per training step"),
    "queries": (int, "object queries Q"),
    "width": (int, "model width C"),
    "pixels": (str, "size of the feature level as HxW, of deformable attention the finest (scopes kernel and attention)"),
    "allowed": (float, "share of pixels that a query's mask allows (scopes kernel and attention)"),
    "op": (str, f"operator of `emca_kernels`, scores (the matrix alone), or a ceiling: {', '.join(CEILINGS)} (scope kernel)"),
    "mask": (str, f"kind of the mask, none by default: {', '.join(MASKS)} (scope kernel)"),
    "pass": (str, f"what a call does, forward by default: {', '.join(PASSES)} (scopes kernel and attention)"),
    "model": (str, "name in the model registry"),
    "image_size": (str, "HxW of the input images; with measure accuracy: of the training crops"),
    "classes": (int, "classes of the model, without the no-object class"),
    "runtime": (str, f"what runs the model, eager by default: {', '.join(RUNTIMES)}"),
    "mask_source": (str, "logits: masks resized as published; features: resized features, the exact rewrite R2"),
    "layers": (int, "decoder layers"),
    "attention_layers": (str, "decoder layers with the arm's attention, all by default: numbers from 0 and ranges, as in 0-2,5"),
    "mask_use": (str, "whether cross-attentions see their masks, always by default: always, annealed, never"),
    "other_attention": (str, "attention of the other decoder layers, masked_fused by default"),
    "pretrained": (bool, "whether the backbone starts from ImageNet weights"),
    "frozen": (bool, "whether the backbone keeps its weights in training"),
    "dataset": (str, "name in the dataset registry (measure accuracy)"),
    "test_split": (str, "split that is evaluated, test by default (measure accuracy)"),
    "task": (str, "what is trained and evaluated: semantic, the default, or panoptic (measure accuracy)"),
    "object_threshold": (float, "least class score of a panoptic segment, 0.8 by default (task panoptic)"),
    "overlap_threshold": (float, "least share of its mask that a panoptic segment keeps, 0.8 by default (task panoptic)"),
    "need": (str, f"what a generated task asks for: {', '.join(NEEDS)} (measure mechanism)"),
    "steps": (int, "optimiser steps (measures accuracy and mechanism)"),
    "learning_rate": (float, "peak learning rate (measure accuracy)"),
    "recipe": (str, "named numbers of a training, short by default: short, mask2former (measure accuracy)"),
    "points": (int, "sampled points per mask in matching and losses (measure accuracy, scope training_step)"),
    "segments": (int, "generated true segments per image (scope training_step)"),
    "backbone_multiplier": (float, "of the learning rate of a pretrained backbone (measure accuracy)"),
    "weight_decay": (float, "of AdamW; norms and embeddings have none (measure accuracy)"),
    "warmup": (float, "share of the steps over which the learning rate rises (measure accuracy)"),
    "schedule": (str, "cosine or poly: how the learning rate falls (measure accuracy)"),
    "clip_norm": (float, "largest 2-norm of all gradients together (measure accuracy)"),
    "precision": (str, "float32, or bfloat16 for autocast in training (measure accuracy)"),
    "ema": (float, "decay of the average of the weights that is evaluated, 0 for none (measure accuracy)"),
    "selection_weight": (
        float,
        "of the loss that draws the choice of a matched query into its true segment, 0 for none (measure accuracy)",
    ),
    "frozen_norms": (bool, "whether batch norms keep what they have in training (measure accuracy)"),
    "short_side": (int, "shorter side of training images in pixels at scale 1, 0 for their own (measure accuracy)"),
    "color": (str, "how colours are jittered: none, simple, ssd (measure accuracy)"),
    "category_area": (
        float,
        "share of one category at which a training crop is drawn anew, 1 for no limit (measure accuracy)",
    ),
    "loader_workers": (int, "processes that read and augment images; 0 holds all images in memory (measure accuracy)"),
    "diagnostic_images": (int, "validation images on which prototypes are looked at, 0 for none (measure accuracy)"),
    "keep_weights": (bool, "whether the run folder keeps the trained weights (measure accuracy)"),
    "seed": (int, "random seed of initialisation, data order and augmentation (measure accuracy)"),
    "train_images": (int, "number of training images, 0 = all (measure accuracy)"),
    "test_images": (int, "number of test images, 0 = all (measure accuracy)"),
}
"""Everything a study may set beside its arms: type and meaning."""

RECIPE_NUMBERS = (
    "selection_weight",
    *("steps", "batch", "learning_rate", "backbone_multiplier", "weight_decay", "warmup", "schedule", "clip_norm", "points"),
    *("precision", "ema", "frozen_norms", "short_side", "color", "category_area", "seed"),
)
"""Parameters that are numbers of the recipe, under the same names."""

TRAINING_PARAMETERS = frozenset(RECIPE_NUMBERS) | {
    *("dataset", "test_split", "task", "object_threshold", "overlap_threshold", "train_images", "test_images", "recipe", "pretrained"),
    *("frozen", "loader_workers", "diagnostic_images", "keep_weights"),
}
"""Parameters that say how a model is trained and scored, not what a call of it costs."""

COST_SUFFIX = "-cost"
"""Ends the name of the study that a table [cost] adds: what the trained configurations cost."""

CHOICES: dict[str, tuple[str, ...]] = {"scope": SCOPES, "task": TASKS, "pass": PASSES, "mask": MASKS, "runtime": RUNTIMES, "need": NEEDS}
"""Values of the parameters that are one of a few words."""

REQUIRED = {
    "kernel": ("op", "pixels", "width", "batch"),
    "attention": ("pixels", "queries", "width", "batch"),
    "model": ("model", "image_size", "classes", "batch"),
    "training_step": ("model", "image_size", "classes", "batch", "points", "segments"),
    "mechanism": ("need", "pixels", "queries", "width", "batch", "steps", "seed"),
    "accuracy": ("model", "dataset", "steps", "batch", "seed", "image_size"),
}
"""Parameters without which a cell cannot be measured."""

_SIZE = re.compile(r"^([1-9]\d*)x([1-9]\d*)$")
_NAME = re.compile(r"^[a-z0-9][a-z0-9_-]*$")


def parse_size(text: str, *, what: str = "size") -> tuple[int, int]:
    """`"64x128"` to (height, width) in pixels; UsageError for anything else."""
    match = _SIZE.match(text)
    if match is None:
        raise UsageError(f"{what} {text!r} is not of the form HEIGHTxWIDTH, for example 64x128")
    return int(match[1]), int(match[2])


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a study is timed."""

    rounds: int = 7
    """Interleaved rounds; each cell is measured once per round, in shuffled order."""
    min_seconds: float = 0.2
    """A round of a cell goes on at least this long ..."""
    min_samples: int = 3
    """... and has at least this many samples,"""
    max_samples: int = 64
    """and at most this many."""
    seed: int = 0
    """Order of the cells within a round, and the random inputs."""

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.min_samples < 1 or self.max_samples < self.min_samples or self.min_seconds < 0:
            raise UsageError(f"settings need rounds >= 1 and 1 <= min_samples <= max_samples, min_seconds >= 0; found {self}")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One contender: an attention of the registry with its switches, under the name that reports print."""

    name: str
    attention: str
    switches: Mapping[str, Value] = field(default_factory=dict)
    overrides: Mapping[str, Value] = field(default_factory=dict)
    """Parameters that this arm sets itself, for example mask_source."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A published claim, and where in the study its measured counterpart stands."""

    claim: str
    metric: str
    """speedup, fps, gmacs (1e9 multiply-adds as fvcore counts them), miou or miou_difference."""
    value: float
    arm: str
    source: str
    against: tuple[str, ...] = ()
    """Baselines of a ratio or a difference; one row each."""
    where: Mapping[str, Value] = field(default_factory=dict)
    tolerance: float = 0.05
    """Relative for ratios, fps and gmacs, absolute (in points) for mIoU."""
    hardware: str = "unstated"
    dataset: str = ""
    """Data set of the claim; a counterpart on other data is not comparable."""


METRICS = ("speedup", "fps", "gmacs", "miou", "miou_difference")


@dataclass(frozen=True, kw_only=True)
class Target:
    """A bound that the project set itself before measuring, at least or at most, and where in the study its number stands."""

    target: str
    metric: str
    """One of TARGET_METRICS."""
    arm: str
    against: tuple[str, ...] = ()
    """Rivals or ceilings; one row each. A rival that overrides an axis stands for all points along it."""
    at_least: float | None = None
    at_most: float | None = None
    where: Mapping[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise UsageError(f"a target needs either at_least or at_most; found {self.at_least} and {self.at_most}")
        if bool(self.against) != TARGET_METRICS[self.metric]:
            needs = "arms to stand against" if TARGET_METRICS[self.metric] else "no 'against'"
            raise UsageError(f"metric {self.metric!r} needs {needs}; found {listing(self.against) or 'none'}")


TARGET_METRICS = {
    "speedup": True,
    "rate_share": True,
    "traffic_share": True,
    "overhead_us": True,
    "memory_share": True,
    "extra_memory": False,
}
"""Whether a metric compares arms. speedup: latency of the other over the arm's. rate_share: FLOP/s of the arm over the other's.
traffic_share: the same of bytes per second, by the least traffic. overhead_us: latency of the arm minus the other's, in microseconds.
memory_share: peak memory of the arm over the other's. extra_memory: peak of a training step beyond inputs, parameters and the gradients
of features and parameters, in matrices of queries (Q x C elements)."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One configuration to measure: an arm at one point of the axes."""

    study: str
    measures: tuple[str, ...]
    method: int
    arm: Arm
    params: Mapping[str, Value]

    def key(self, measure: str) -> str:
        """16 hex digits that identify this cell and measure; the identity under which a run resumes."""
        identity = {
            "schema": SCHEMA,
            "study": self.study,
            "method": self.method,
            "measure": measure,
            "arm": [self.arm.name, self.arm.attention, dict(self.arm.switches)],
            "params": dict(self.params),
        }
        return hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:16]

    def label(self) -> str:
        """One line for progress and errors."""
        shown = ("scope", "op", "model", "pixels", "pass", "image_size", "dataset", "seed")
        return " ".join([self.arm.name, *(f"{name}={self.params[name]}" for name in shown if name in self.params)])


@dataclass(frozen=True, kw_only=True)
class Study:
    """A resolved study file."""

    name: str
    title: str
    question: str
    measures: tuple[str, ...]
    baselines: tuple[str, ...]
    arms: tuple[Arm, ...]
    axes: Mapping[str, tuple[Value, ...]]
    fixed: Mapping[str, Value]
    settings: Settings
    expected: tuple[Expected, ...] = ()
    targets: tuple[Target, ...] = ()
    method: int = 1
    margin: float = 0.5
    """Non-inferiority margin of accuracy in points of mIoU, or of PQ where the task is panoptic, stated before the run."""
    quick: bool = False

    def cells(self) -> list[Cell]:
        """Every point of the axes for every arm, arms innermost so that rivals are measured side by side.

        An arm that overrides an axis has one cell along it.
        """
        names = list(self.axes)
        cells: dict[str, Cell] = {}
        for values in itertools.product(*(self.axes[name] for name in names)):
            for arm in self.arms:
                params = {**self.fixed, **dict(zip(names, values, strict=True)), **arm.overrides}
                cell = Cell(study=self.name, measures=self.measures, method=self.method, arm=arm, params=MappingProxyType(params))
                cells.setdefault(cell.key(self.measures[0]), cell)
        return list(cells.values())

    def only(self, conditions: Mapping[str, str]) -> Study:
        """The part of the study where parameters (or `arm`) equal the given values, compared as text."""
        study = self
        for name, wanted in conditions.items():
            if name in TRAINING_PARAMETERS and self.name.endswith(COST_SUFFIX):
                continue
            if name == "arm":
                known = [arm.name for arm in self.arms]
                kept = tuple(arm for arm in study.arms if arm.name == wanted)
                if not kept:
                    raise UsageError(f"study {self.name!r} has no arm {wanted!r}{did_you_mean(wanted, known)}; its arms: {listing(known)}")
                study = replace(study, arms=kept)
            elif name in self.axes:
                found = tuple(value for value in self.axes[name] if str(value) == wanted)
                if not found:
                    raise UsageError(
                        f"axis {name!r} of study {self.name!r} has no value {wanted!r}; its values: {listing(map(str, self.axes[name]))}"
                    )
                study = replace(study, axes={**study.axes, name: found})
            elif name not in self.fixed or str(self.fixed[name]) != wanted:
                raise UsageError(
                    f"study {self.name!r} has no axis {name!r}{did_you_mean(name, self.axes)}; its axes: arm, {listing(self.axes)}"
                )
        return study


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no white space: the same bytes for the same value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def load_studies(path: Path, *, quick: bool = False) -> list[Study]:
    """The studies of one TOML file: one, or those that a union names; a table [cost] adds one, see `COST_SUFFIX`.

    Args:
        path: the file; a union (`[study] union = [...]`) names its neighbours without `.toml`.
        quick: apply each study's `[quick]` table. A union may ask for it itself.

    Raises:
        UsageError: with the file, the key, what was found and what was expected.
    """
    data = _read_like(path)
    study = data.get("study", {})
    if not isinstance(study, dict) or "union" not in study:
        return _Reader(path, data).studies(quick=quick)
    _known_keys(path, data, ("study",), "table")
    _known_keys(path, study, ("name", "title", "question", "union", "quick"), "key of [study]")
    return [
        found for name in study["union"] for found in load_studies(path.with_name(f"{name}.toml"), quick=quick or bool(study.get("quick")))
    ]


def _read_like(path: Path) -> dict[str, Any]:
    """A file, laid over the one that `[study] like` names; lists and values are replaced, tables are merged."""
    data = _read(path)
    study = data.get("study", {})
    if not isinstance(study, dict) or "like" not in study:
        _check_arm_tables(path, data, _named_arms(data))
        return data
    name = study.pop("like")
    if not isinstance(name, str) or name == path.stem:
        raise UsageError(f"{path}: 'like' in [study] must name another study beside it, found {name!r}")
    found = _merged(_read_like(path.with_name(f"{name}.toml")), data)
    # what becomes an axis is fixed no more, and the other way round
    for here, there in (("axes", "fixed"), ("fixed", "axes")):
        for key in data.get(here, {}):
            found.get(there, {}).pop(key, None)
    _check_arm_tables(path, data, _named_arms(found))
    return found


def _check_arm_tables(path: Path, data: Mapping[str, Any], named: Sequence[str]) -> None:
    """A misspelt table would leave its arm with defaults; a study that has no list of arms yet is complained about elsewhere."""
    if named:
        _known_keys(path, _table_of(data, "arms"), named, "table in [arms]; an axis must name it:")


def _table_of(data: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """A table within tables, empty where there is none."""
    for name in names:
        found = data.get(name, {})
        data = found if isinstance(found, dict) else {}
    return data


def _named_arms(data: Mapping[str, Any]) -> list[str]:
    """Arms of a study and of its quick form."""
    lists = [_table_of(data, *tables).get("arm", []) for tables in (("axes",), ("quick", "axes"))]
    return list(dict.fromkeys(str(name) for names in lists if isinstance(names, list) for name in names))


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = _merged(found[key], value) if both else value
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"study file {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"study file {path} is not valid TOML: {error}") from None


def _known_keys(path: Path, found: Mapping[str, Any], known: Iterable[str], what: str) -> None:
    known = list(known)
    for key in found:
        if key not in known:
            raise UsageError(f"{path}: unknown {what} {key!r}{did_you_mean(key, known)}; known: {listing(known)}")


class _Reader:
    """Turns the tables of one file into a Study; every complaint names the file and the key."""

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path = path
        self.data = data

    def studies(self, *, quick: bool) -> list[Study]:
        """The study of the file, and what its arms cost if the file asks for it."""
        study = self.study(quick=quick)
        return [study, self._cost(study)] if "cost" in self.data else [study]

    def _cost(self, study: Study) -> Study:
        """The arms of a study, each once, without what concerns training."""
        table, overlay = self._table("cost"), self._table("quick").get("cost", {}) if study.quick else {}
        for part, name in ((table, "key of [cost]"), (overlay, "key of [quick.cost]")):
            _known_keys(self.path, part, ("measures", "fixed", "settings"), name)
        kept = {name: value for name, value in study.fixed.items() if name not in TRAINING_PARAMETERS}
        own = {name: self._value(name, value) for name, value in {**table.get("fixed", {}), **overlay.get("fixed", {})}.items()}
        arms = [
            replace(arm, overrides={name: value for name, value in arm.overrides.items() if name not in TRAINING_PARAMETERS})
            for arm in study.arms
        ]
        cost = replace(
            study,
            name=study.name + COST_SUFFIX,
            title=f"{study.title}: cost",
            question="What does a call of each arm cost?",
            measures=tuple(table.get("measures", ("macs", "latency", "memory"))),
            arms=tuple(arms),
            axes={name: values for name, values in study.axes.items() if name not in TRAINING_PARAMETERS},
            fixed={**kept, **own},
            settings=self._settings({**table.get("settings", {}), **overlay.get("settings", {})}),
            expected=(),
            targets=(),
        )
        self._check(cost)
        return cost

    def study(self, *, quick: bool) -> Study:
        _known_keys(self.path, self.data, ("study", "settings", "fixed", "axes", "arms", "quick", "cost", "expected", "target"), "table")
        head = self._table("study")
        _known_keys(self.path, head, ("name", "title", "question", "measures", "baselines", "method", "margin"), "key of [study]")
        overlay = self._table("quick")
        _known_keys(self.path, overlay, ("settings", "fixed", "axes", "cost"), "table in [quick]")
        if not quick:
            overlay = {}
        name = self._need(head, "name", str, "[study]")
        if not _NAME.match(name):
            raise UsageError(f"{self.path}: study name {name!r} may hold lower-case letters, digits, '-' and '_' only")
        axes = {**self._table("axes"), **overlay.get("axes", {})}
        arms = self._arms(axes.pop("arm", None))
        measures = tuple(self._need(head, "measures", list, "[study]"))
        for measure in measures:
            self._choice("measure", measure, MEASURES)
        study = Study(
            name=name,
            title=self._need(head, "title", str, "[study]"),
            question=self._need(head, "question", str, "[study]"),
            measures=measures,
            baselines=tuple(head.get("baselines", ())),
            arms=arms,
            axes={key: self._values(key, values) for key, values in axes.items()},
            fixed={key: self._value(key, value) for key, value in {**self._table("fixed"), **overlay.get("fixed", {})}.items()},
            settings=self._settings({**self._table("settings"), **overlay.get("settings", {})}),
            expected=tuple(self._expected(entry) for entry in self.data.get("expected", [])),
            targets=tuple(self._target(entry, arms) for entry in self.data.get("target", [])),
            method=int(head.get("method", 1)),
            margin=float(head.get("margin", 0.5)),
            quick=quick,
        )
        self._check(study)
        return study

    def _table(self, name: str) -> dict[str, Any]:
        table = self.data.get(name, {})
        if not isinstance(table, dict):
            raise UsageError(f"{self.path}: {name!r} must be a table, found {table!r}")
        return table

    def _need(self, table: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
        if key not in table:
            raise UsageError(f"{self.path}: {where} lacks {key!r}")
        if not isinstance(table[key], kind):
            raise UsageError(f"{self.path}: {key!r} in {where} must be {kind.__name__}, found {table[key]!r}")
        return table[key]

    def _choice(self, what: str, found: object, known: Iterable[str]) -> None:
        known = list(known)
        if found not in known:
            raise UsageError(f"{self.path}: unknown {what} {found!r}{did_you_mean(str(found), known)}; known: {listing(known)}")

    def _value(self, key: str, value: Any) -> Value:
        self._choice("parameter", key, PARAMETERS)
        kind, meaning = PARAMETERS[key]
        if kind is float and type(value) is int:
            value = float(value)
        found_kind = type(value)
        if found_kind is not kind:
            raise UsageError(f"{self.path}: parameter {key!r} ({meaning}) must be {kind.__name__}, found {value!r}")
        if key in ("pixels", "image_size"):
            parse_size(str(value), what=f"{self.path}: parameter {key!r}")
        if key in CHOICES:
            self._choice(key, value, CHOICES[key])
        if key.endswith("_threshold") and not 0 <= float(value) <= 1:
            raise UsageError(f"{self.path}: parameter {key!r} ({meaning}) must be in 0..1, found {value!r}")
        return value

    def _values(self, key: str, values: Any) -> tuple[Value, ...]:
        if not isinstance(values, list) or not values:
            raise UsageError(f"{self.path}: axis {key!r} must be a list with at least one value, found {values!r}")
        found = tuple(self._value(key, value) for value in values)
        if len(set(found)) != len(found):
            raise UsageError(f"{self.path}: axis {key!r} names a value twice: {values!r}")
        return found

    def _arms(self, names: Any) -> tuple[Arm, ...]:
        if not isinstance(names, list) or not names or len(set(names)) != len(names):
            raise UsageError(f"{self.path}: [axes] needs arm = [...] with distinct names, found {names!r}")
        tables = self._table("arms")
        return tuple(self._arm(name, tables.get(name, {})) for name in names)

    def _arm(self, name: str, table: Mapping[str, Any]) -> Arm:
        switches = {key: value for key, value in table.items() if key != "attention" and key not in PARAMETERS}
        overrides = {key: self._value(key, value) for key, value in table.items() if key in PARAMETERS}
        return Arm(name=name, attention=table.get("attention", name), switches=switches, overrides=overrides)

    def _settings(self, table: dict[str, Any]) -> Settings:
        _known_keys(self.path, table, (entry.name for entry in fields(Settings)), "key of [settings]")
        try:
            return Settings(**table)
        except (UsageError, TypeError) as error:
            raise UsageError(f"{self.path}: [settings]: {error}") from None

    def _expected(self, entry: dict[str, Any]) -> Expected:
        _known_keys(self.path, entry, (item.name for item in fields(Expected)), "key of [[expected]]")
        for key, kind in (("claim", str), ("metric", str), ("arm", str), ("source", str)):
            self._need(entry, key, kind, "[[expected]]")
        self._choice("metric", entry["metric"], METRICS)
        for name in (entry["arm"], *entry.get("against", ())):
            # a quick form without the arm leaves the claim open
            self._choice("arm", name, _named_arms(self.data))
        where = {name: self._value(name, value) for name, value in entry.get("where", {}).items()}
        try:
            return Expected(**{**entry, "value": float(entry["value"]), "where": where, "against": tuple(entry.get("against", ()))})
        except (TypeError, ValueError, KeyError) as error:
            raise UsageError(f"{self.path}: [[expected]] {entry.get('claim')!r}: {error}") from None

    def _target(self, entry: dict[str, Any], arms: tuple[Arm, ...]) -> Target:
        _known_keys(self.path, entry, (item.name for item in fields(Target)), "key of [[target]]")
        for key in ("target", "metric", "arm"):
            self._need(entry, key, str, "[[target]]")
        self._choice("metric", entry["metric"], TARGET_METRICS)
        for name in (entry["arm"], *entry.get("against", ())):
            self._choice("arm", name, [arm.name for arm in arms])
        where = {name: self._value(name, value) for name, value in entry.get("where", {}).items()}
        try:
            bounds: dict[str, Any] = {name: float(entry[name]) for name in ("at_least", "at_most") if name in entry}
            return Target(**{**entry, **bounds, "where": where, "against": tuple(entry.get("against", ()))})
        except (TypeError, ValueError, UsageError) as error:
            raise UsageError(f"{self.path}: [[target]] {entry['target']!r}: {error}") from None

    def _check(self, study: Study) -> None:
        both = set(study.axes) & set(study.fixed)
        if both:
            raise UsageError(f"{self.path}: {listing(both)} stands in [axes] and in [fixed]")
        if "scope" not in {*study.axes, *study.fixed}:
            raise UsageError(f"{self.path}: no scope, set one in [fixed] or [axes]: {listing(SCOPES)}")
        for baseline in study.baselines:
            self._choice("baseline arm", baseline, [arm.name for arm in study.arms])
        for cell in study.cells():
            scope = str(cell.params["scope"])
            trains = next((measure for measure in ("accuracy", "mechanism") if measure in study.measures), None)
            kind = trains if trains is not None else scope if scope in REQUIRED else "model"
            uncounted = scope in ("kernel", "training_step") or cell.params.get("pass", PASSES[0]) != PASSES[0]
            if uncounted and {"macs", "accuracy"} & set(study.measures):
                raise UsageError(
                    f"{self.path}: scopes kernel and training_step and pass forward_backward take measures latency and memory only"
                )
            for name in REQUIRED[kind]:
                if name not in cell.params:
                    raise UsageError(f"{self.path}: scope {cell.params['scope']!r} needs parameter {name!r} ({PARAMETERS[name][1]})")


def find_study(name: str) -> Path:
    """The file of a study: a path as it stands, else `NAME.toml` in `ablations/` here or beside the installed source."""
    given = Path(name)
    if given.suffix == ".toml":
        return given
    folders = study_folders()
    for folder in folders:
        if (folder / f"{name}.toml").is_file():
            return folder / f"{name}.toml"
    known = [path.stem for folder in folders for path in folder.glob("*.toml")]
    looked = " and ".join(str(folder) for folder in folders)
    raise UsageError(f"unknown study {name!r}{did_you_mean(name, known)}; looked in {looked}; known: {listing(known) or 'none'}")


def study_folders() -> list[Path]:
    """Where study files are looked for, first come first served."""
    here = Path("ablations")
    beside = Path(__file__).resolve().parents[1] / "ablations"
    return [here] if here.resolve() == beside else [here, beside]


def dump_lock(studies: Iterable[Study]) -> str:
    """Resolved studies as JSON, for the lock file of a run folder: what was planned, whatever becomes of the TOML files."""
    return json.dumps({"schema": SCHEMA, "studies": [_plain(study) for study in studies]}, indent=1) + "\n"


def load_lock(path: Path) -> list[Study]:
    """The studies that `dump_lock` wrote.

    Raises:
        UsageError: no such file, not JSON, or written by another schema.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UsageError(f"{path.parent} is no run folder: {path.name} is not there") from None
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from None
    if data.get("schema") != SCHEMA:
        raise UsageError(f"{path} has schema {data.get('schema')}, this version reads {SCHEMA}")
    return [_study_from(entry) for entry in data["studies"]]


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return {entry.name: _plain(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value


def _study_from(entry: dict[str, Any]) -> Study:
    # a lock file from before there were targets has none
    targets = (Target(**{**target, "against": tuple(target["against"])}) for target in entry.get("targets", ()))
    return Study(
        **{
            **entry,
            "targets": tuple(targets),
            "measures": tuple(entry["measures"]),
            "baselines": tuple(entry["baselines"]),
            "arms": tuple(Arm(**arm) for arm in entry["arms"]),
            "axes": {name: tuple(values) for name, values in entry["axes"].items()},
            "settings": Settings(**entry["settings"]),
            "expected": tuple(Expected(**{**claim, "against": tuple(claim["against"])}) for claim in entry["expected"]),
        }
    )
