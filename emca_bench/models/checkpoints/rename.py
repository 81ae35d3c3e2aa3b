"""Renaming of tensors by rules that read in both directions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

PARTS = 3
"""Queries, keys and values: stacked in one tensor here, three tensors there."""


class Rule(NamedTuple):
    """The beginning of a name here and there; `#` stands for a number, and what follows is kept.

    With a part, the tensor there is that third of the tensor here.
    """

    ours: str
    theirs: str
    part: int | None = None


class Renaming:
    """Rules, of which the first that fits a name is used."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.rules = tuple(rules)
        self._ours = [_pattern(rule.ours) for rule in self.rules]
        self._theirs = [_pattern(rule.theirs) for rule in self.rules]

    def to_ours(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Renamed and stacked tensors; names that no rule fits, and stacks with a part missing, stay as they are."""
        renamed: dict[str, Tensor] = {}
        stacks: dict[str, dict[int, str]] = {}
        for name, tensor in theirs.items():
            target, part = self._our_name(name)
            if part is None:
                renamed[target] = tensor
            else:
                stacks.setdefault(target, {})[part] = name
        for target, sources in stacks.items():
            shapes = {theirs[source].shape for source in sources.values()}
            if len(sources) == PARTS and len(shapes) == 1:
                renamed[target] = torch.cat([theirs[sources[part]] for part in range(PARTS)])
            else:
                renamed |= {source: theirs[source] for source in sources.values()}
        return renamed

    def to_theirs(self, ours: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Renamed and divided tensors, and the names that no rule fits."""
        renamed: dict[str, Tensor] = {}
        left: list[str] = []
        for name, tensor in ours.items():
            fitting = next((rule for rule, pattern in zip(self.rules, self._ours, strict=True) if pattern.match(name)), None)
            if fitting is None:
                left.append(name)
            elif fitting.part is None:
                renamed[_moved(name, fitting.ours, fitting.theirs)] = tensor
            else:
                for rule in self.rules:
                    if rule.ours == fitting.ours and rule.part is not None:
                        renamed[_moved(name, rule.ours, rule.theirs)] = tensor.chunk(PARTS)[rule.part]
        return renamed, left

    def _our_name(self, name: str) -> tuple[str, int | None]:
        for rule, pattern in zip(self.rules, self._theirs, strict=True):
            if pattern.match(name):
                return _moved(name, rule.theirs, rule.ours), rule.part
        return name, None


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\#", r"(\d+)"))


def _moved(name: str, source: str, target: str) -> str:
    match = _pattern(source).match(name)
    assert match is not None
    numbers = iter(match.groups())
    return re.sub("#", lambda _: next(numbers), target) + name[match.end() :]
