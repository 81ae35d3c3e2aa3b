"""Study files: where they are, and what stands in one once those that it names are laid under it."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from emca_bench.errors import UsageError, did_you_mean, listing


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
    beside = Path(__file__).resolve().parents[2] / "ablations"
    return [here] if here.resolve() == beside else [here, beside]


def read_like(path: Path) -> dict[str, Any]:
    """A file, laid over the one that `[study] like` names; lists and values are replaced, tables are merged."""
    data = _read(path)
    study = data.get("study", {})
    if not isinstance(study, dict) or "like" not in study:
        _check_arm_tables(path, data, named_arms(data))
        return data
    name = study.pop("like")
    if not isinstance(name, str) or name == path.stem:
        raise UsageError(f"{path}: 'like' in [study] must name another study beside it, found {name!r}")
    found = _merged(read_like(path.with_name(f"{name}.toml")), data)
    # what becomes an axis is fixed no more, and the other way round
    for here, there in (("axes", "fixed"), ("fixed", "axes")):
        for key in data.get(here, {}):
            found.get(there, {}).pop(key, None)
    _check_arm_tables(path, data, named_arms(found))
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"study file {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"study file {path} is not valid TOML: {error}") from None


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = _merged(found[key], value) if both else value
    return found


def _check_arm_tables(path: Path, data: Mapping[str, Any], named: Sequence[str]) -> None:
    """A misspelt table would leave its arm with defaults; a study that has no list of arms yet is complained about elsewhere."""
    if named:
        known_keys(path, _table_of(data, "arms"), named, "table in [arms]; an axis must name it:")


def _table_of(data: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """A table within tables, empty where there is none."""
    for name in names:
        found = data.get(name, {})
        data = found if isinstance(found, dict) else {}
    return data


def named_arms(data: Mapping[str, Any]) -> list[str]:
    """Arms of a study and of its quick form."""
    lists = [_table_of(data, *tables).get("arm", []) for tables in (("axes",), ("quick", "axes"))]
    return list(dict.fromkeys(str(name) for names in lists if isinstance(names, list) for name in names))


def known_keys(path: Path, found: Mapping[str, Any], known: Iterable[str], what: str) -> None:
    """Complain about the first key of a table that is not among the known ones; `what` names it, as in "key of [study]"."""
    known = list(known)
    for key in found:
        if key not in known:
            raise UsageError(f"{path}: unknown {what} {key!r}{did_you_mean(key, known)}; known: {listing(known)}")
