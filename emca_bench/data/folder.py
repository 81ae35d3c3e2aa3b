"""Reader of the layout many semantic datasets share: a folder of images beside a folder of index PNGs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from emca_bench.data.base import IGNORE, ClassInfo, Dataset, Sample, check_split, fingerprint_of
from emca_bench.errors import UsageError

ROOT_VARIABLES = ("EMCA_DATASETS", "DETECTRON2_DATASETS")
"""Environment variables with the folders that hold dataset folders, separated by os.pathsep; in this order."""

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What Pillow raises for damaged files."""


class SemanticFolder(Dataset):
    """Images with a PNG each, of one channel of 8 bits whose value is the class index or IGNORE.

    The file lists are checked on opening, the pixels when a sample is read.

    Args:
        name: the dataset's name.
        split: one of `splits`.
        classes: class `i` has the value `i` in the labels.
        folder: the dataset's folder.
        splits: the dataset's splits.
        images, labels: subfolders, with `{split}` for the split.
        image_suffix, label_suffix: ends of the file names; what comes before them pairs an image with its labels.
        nested: whether to look in folders below `images` and `labels` too.
        values: value in the label files to class index or IGNORE; None where the values are the indices.

    Raises:
        UsageError: an unknown split, a missing or empty folder, an image without labels or labels without an image; on reading, a file that
            cannot be decoded, labels of another size than their image, or a value that is no class.
    """

    def __init__(
        self,
        name: str,
        split: str,
        classes: Sequence[ClassInfo],
        *,
        folder: Path,
        splits: tuple[str, ...] = ("train", "val", "test"),
        images: str = "images/{split}",
        labels: str = "annotations/{split}",
        image_suffix: str = ".jpg",
        label_suffix: str = ".png",
        nested: bool = False,
        values: Mapping[int, int] | None = None,
    ) -> None:
        check_split(name, split, splits)
        self.name, self.split, self.classes = name, split, tuple(classes)
        self._values = {**{index: index for index in range(len(self.classes))}, IGNORE: IGNORE} if values is None else dict(values)
        self._images = files_by_stem(f"images of {name} {split}", folder / images.format(split=split), image_suffix, nested=nested)
        self._labels = files_by_stem(f"labels of {name} {split}", folder / labels.format(split=split), label_suffix, nested=nested)
        self._stems = sorted(self._images)
        check_pairs(self._images, self._labels, f"labels {label_suffix!r}", folder / labels.format(split=split))
        check_pairs(self._labels, self._images, f"image {image_suffix!r}", folder / images.format(split=split))

    def __len__(self) -> int:
        return len(self._stems)

    def read(self, index: int) -> Sample:
        """The sample at an index, in the order of names."""
        stem = self._stems[index]
        image = decode(self._images[stem], "RGB")
        raw = decode(self._labels[stem], None)
        self._check_labels(raw, self._labels[stem])
        table = np.full(256, IGNORE, dtype=np.uint8)
        table[list(self._values)] = list(self._values.values())
        return Sample(stem, image, table[raw])

    def fingerprint(self) -> str:
        """Changes with the names and the sizes of the files."""
        files = [[stem, self._images[stem].stat().st_size, self._labels[stem].stat().st_size] for stem in self._stems]
        return fingerprint_of([self.name, self.split, files])

    def _check_labels(self, raw: npt.NDArray[np.uint8], path: Path) -> None:
        pixels = np.bincount(raw.ravel(), minlength=IGNORE + 1)
        unknown = [int(value) for value in np.flatnonzero(pixels) if int(value) not in self._values]
        if unknown:
            found = ", ".join(f"{value} ({pixels[value]} pixels)" for value in unknown)
            known = [value for value in self._values if value != IGNORE]
            ignore = f" or {IGNORE} for ignore" if IGNORE in self._values else ""
            raise UsageError(f"labels {path} hold unknown class ids: {found}; expected {min(known)}..{max(known)}{ignore}")


def find_dataset_folder(name: str, root: str | os.PathLike[str] | None, *, folder: str | None = None) -> Path:
    """The first existing folder of a dataset: `<root>/<folder>`, where root is the argument or else each place of ROOT_VARIABLES.

    Args:
        name: of the dataset, for messages.
        root: the place, or None for the environment's.
        folder: below the root; None if it is called as the dataset.

    Raises:
        UsageError: no root is known, or none holds the folder.
    """
    folder = name if folder is None else folder
    places = dataset_places() if root is None else [Path(root)]
    if not places:
        first, second = ROOT_VARIABLES
        raise UsageError(
            f"dataset {name!r} needs a place: {first} is not set (nor is {second}); "
            f"expected the folder that holds {folder!r} there or as option 'root'"
        )
    candidates = [place.expanduser() / folder for place in places]
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    set_ = ", ".join(f"{variable}={os.environ[variable]!r}" for variable in ROOT_VARIABLES if os.environ.get(variable))
    source = set_ if root is None else f"root={os.fspath(root)!r}"
    raise UsageError(f"dataset {name!r} is not in {source}; looked for the folder {' and '.join(map(str, candidates))}")


def dataset_places() -> list[Path]:
    """The folders that ROOT_VARIABLES name, those of the first variable first."""
    return [Path(entry) for variable in ROOT_VARIABLES for entry in os.environ.get(variable, "").split(os.pathsep) if entry]


def first_existing(what: str, *candidates: Path) -> Path:
    """The first of the paths that is there; UsageError with all of them if none is."""
    for path in candidates:
        if path.exists():
            return path
    raise UsageError(f"no {what}; looked for {' and '.join(map(str, candidates))}")


def files_by_stem(what: str, folder: Path, suffix: str, *, nested: bool = False) -> dict[str, Path]:
    """Files of a folder by their name without the suffix; UsageError where there are none."""
    if not folder.is_dir():
        raise UsageError(f"no {what}: the folder {folder} does not exist")
    found = folder.rglob(f"*{suffix}") if nested else folder.iterdir()
    files = {path.name.removesuffix(suffix): path for path in found if path.name.endswith(suffix)}
    if not files:
        raise UsageError(f"no {what}: the folder {folder} holds no file that ends with {suffix!r}")
    return files


def check_pairs(files: dict[str, Path], partners: dict[str, Path], partner: str, folder: Path) -> None:
    """Raise UsageError where a file has no partner of the same stem."""
    lone = sorted(files.keys() - partners.keys())
    if lone:
        more = f" (and {len(lone) - 1} more)" if len(lone) > 1 else ""
        raise UsageError(f"{files[lone[0]]}{more} has no {partner} of the same name in {folder}")


def decode(path: Path, mode: str | None) -> npt.NDArray[np.uint8]:
    """Pixels converted to a Pillow mode, or with None the values of a single 8-bit channel as they are.

    Raises:
        UsageError: not a whole image file, or more than one channel where one was expected.
    """
    try:
        with Image.open(path) as picture:
            if mode is None and picture.mode not in ("L", "P"):
                raise UsageError(f"labels {path} have the pixel mode {picture.mode!r}; expected one channel of 8 bits ('L' or 'P')")
            if mode == "RGB" and picture.mode.startswith("I"):
                return _high_bytes(np.array(picture), path)
            return np.array(picture if mode is None else picture.convert(mode), dtype=np.uint8)
    except UsageError:
        raise
    except UNREADABLE as error:
        raise UsageError(f"cannot decode {path} ({path.stat().st_size} bytes): {error}; expected a whole image file") from error


def _high_bytes(gray: npt.NDArray[np.integer], path: Path) -> npt.NDArray[np.uint8]:
    """A grey image of 16 bits as Pillow reads a coloured one: the high byte. Its conversion of grey ones clips at 255."""
    if gray.size and (gray.min() < 0 or gray.max() > 0xFFFF):
        raise UsageError(f"image {path} has values in {gray.min()}..{gray.max()}; expected 8 or 16 bits")
    return np.repeat((gray >> 8).astype(np.uint8)[..., None], 3, axis=-1)
