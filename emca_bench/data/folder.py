"""Reader of the layout many semantic datasets share: a folder of images beside a folder of index PNGs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from emca_bench.data.base import IGNORE, ClassInfo, Dataset, Sample, check_split, fingerprint_of
from emca_bench.errors import UsageError

ROOT_VARIABLE = "EMCA_DATASETS"
"""Environment variable with the folders that hold dataset folders, separated by os.pathsep."""

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
    ) -> None:
        check_split(name, split, splits)
        self.name, self.split, self.classes = name, split, tuple(classes)
        self._images = _files_by_stem(f"images of {name} {split}", folder / images.format(split=split), image_suffix)
        self._labels = _files_by_stem(f"labels of {name} {split}", folder / labels.format(split=split), label_suffix)
        self._stems = sorted(self._images)
        _check_pairs(self._images, self._labels, f"labels {label_suffix!r}", folder / labels.format(split=split))
        _check_pairs(self._labels, self._images, f"image {image_suffix!r}", folder / images.format(split=split))

    def __len__(self) -> int:
        return len(self._stems)

    def read(self, index: int) -> Sample:
        """The sample at an index, in the order of names."""
        stem = self._stems[index]
        image = _decode(self._images[stem], "RGB")
        semantic = _decode(self._labels[stem], None)
        self._check_labels(semantic, self._labels[stem])
        return Sample(stem, image, semantic)

    def fingerprint(self) -> str:
        """Changes with the names and the sizes of the files."""
        files = [[stem, self._images[stem].stat().st_size, self._labels[stem].stat().st_size] for stem in self._stems]
        return fingerprint_of([self.name, self.split, files])

    def _check_labels(self, semantic: npt.NDArray[np.uint8], path: Path) -> None:
        pixels = np.bincount(semantic.ravel(), minlength=IGNORE + 1)
        unknown = [int(value) for value in np.flatnonzero(pixels) if value != IGNORE and value >= len(self.classes)]
        if unknown:
            found = ", ".join(f"{value} ({pixels[value]} pixels)" for value in unknown)
            raise UsageError(f"labels {path} hold unknown class ids: {found}; expected 0..{len(self.classes) - 1} or {IGNORE} for ignore")


def find_dataset_folder(name: str, root: str | os.PathLike[str] | None) -> Path:
    """The first existing `<root>/<name>`, where root is the argument or else each folder of EMCA_DATASETS.

    Raises:
        UsageError: no root is known, or none holds the folder.
    """
    source = f"{ROOT_VARIABLE}={os.environ.get(ROOT_VARIABLE, '')!r}" if root is None else f"root={os.fspath(root)!r}"
    roots = [entry for entry in (os.environ.get(ROOT_VARIABLE, "").split(os.pathsep) if root is None else [os.fspath(root)]) if entry]
    if not roots:
        raise UsageError(
            f"dataset {name!r} needs a place: {ROOT_VARIABLE} is not set; expected the folder that holds {name!r} there or as option 'root'"
        )
    candidates = [Path(entry).expanduser() / name for entry in roots]
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise UsageError(f"dataset {name!r} is not in {source}; looked for the folder {' and '.join(map(str, candidates))}")


def _files_by_stem(what: str, folder: Path, suffix: str) -> dict[str, Path]:
    if not folder.is_dir():
        raise UsageError(f"no {what}: the folder {folder} does not exist")
    files = {path.name.removesuffix(suffix): path for path in folder.iterdir() if path.name.endswith(suffix)}
    if not files:
        raise UsageError(f"no {what}: the folder {folder} holds no file that ends with {suffix!r}")
    return files


def _check_pairs(files: dict[str, Path], partners: dict[str, Path], partner: str, folder: Path) -> None:
    lone = sorted(files.keys() - partners.keys())
    if lone:
        more = f" (and {len(lone) - 1} more)" if len(lone) > 1 else ""
        raise UsageError(f"{files[lone[0]]}{more} has no {partner} of the same name in {folder}")


def _decode(path: Path, mode: str | None) -> npt.NDArray[np.uint8]:
    """Pixels converted to a Pillow mode, or with None the values of a single 8-bit channel as they are."""
    try:
        with Image.open(path) as picture:
            if mode is None and picture.mode not in ("L", "P"):
                raise UsageError(f"labels {path} have the pixel mode {picture.mode!r}; expected one channel of 8 bits ('L' or 'P')")
            return np.array(picture if mode is None else picture.convert(mode), dtype=np.uint8)
    except UsageError:
        raise
    except UNREADABLE as error:
        raise UsageError(f"cannot decode {path} ({path.stat().st_size} bytes): {error}; expected a whole image file") from error
