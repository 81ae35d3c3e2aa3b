"""From the tables of a study file to the studies that it asks for; every complaint names the file and the key."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from emca_bench.errors import UsageError, did_you_mean, listing
from emca_bench.specs.files import known_keys, named_arms, read_like
from emca_bench.specs.parameters import CHOICES, MEASURES, PARAMETERS, PASSES, REQUIRED, SCOPES, TRAINING_PARAMETERS, Value, parse_size
from emca_bench.specs.study import COST_SUFFIX, METRICS, TARGET_METRICS, Arm, Expected, Settings, Study, Target

_NAME = re.compile(r"^[a-z0-9][a-z0-9_-]*$")


def load_studies(path: Path, *, quick: bool = False) -> list[Study]:
    """The studies of one TOML file: one, or those that a union names; a table [cost] adds one, see `COST_SUFFIX`.

    Args:
        path: the file; a union (`[study] union = [...]`) names its neighbours without `.toml`.
        quick: apply each study's `[quick]` table. A union may ask for it itself.

    Raises:
        UsageError: with the file, the key, what was found and what was expected.
    """
    data = read_like(path)
    study = data.get("study", {})
    if not isinstance(study, dict) or "union" not in study:
        return _Reader(path, data).studies(quick=quick)
    known_keys(path, data, ("study",), "table")
    known_keys(path, study, ("name", "title", "question", "union", "quick"), "key of [study]")
    return [
        found for name in study["union"] for found in load_studies(path.with_name(f"{name}.toml"), quick=quick or bool(study.get("quick")))
    ]


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
            known_keys(self.path, part, ("measures", "fixed", "settings"), name)
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
        known_keys(self.path, self.data, ("study", "settings", "fixed", "axes", "arms", "quick", "cost", "expected", "target"), "table")
        head = self._table("study")
        known_keys(self.path, head, ("name", "title", "question", "measures", "baselines", "method", "margin"), "key of [study]")
        overlay = self._table("quick")
        known_keys(self.path, overlay, ("settings", "fixed", "axes", "cost"), "table in [quick]")
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
        known_keys(self.path, table, (entry.name for entry in fields(Settings)), "key of [settings]")
        try:
            return Settings(**table)
        except (UsageError, TypeError) as error:
            raise UsageError(f"{self.path}: [settings]: {error}") from None

    def _expected(self, entry: dict[str, Any]) -> Expected:
        known_keys(self.path, entry, (item.name for item in fields(Expected)), "key of [[expected]]")
        for key, kind in (("claim", str), ("metric", str), ("arm", str), ("source", str)):
            self._need(entry, key, kind, "[[expected]]")
        self._choice("metric", entry["metric"], METRICS)
        for name in (entry["arm"], *entry.get("against", ())):
            # a quick form without the arm leaves the claim open
            self._choice("arm", name, named_arms(self.data))
        where = {name: self._value(name, value) for name, value in entry.get("where", {}).items()}
        try:
            return Expected(**{**entry, "value": float(entry["value"]), "where": where, "against": tuple(entry.get("against", ()))})
        except (TypeError, ValueError, KeyError) as error:
            raise UsageError(f"{self.path}: [[expected]] {entry.get('claim')!r}: {error}") from None

    def _target(self, entry: dict[str, Any], arms: tuple[Arm, ...]) -> Target:
        known_keys(self.path, entry, (item.name for item in fields(Target)), "key of [[target]]")
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
