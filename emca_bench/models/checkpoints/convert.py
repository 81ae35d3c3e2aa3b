"""A checkpoint in another format, or under other names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from emca_bench.errors import UsageError, did_you_mean
from emca_bench.models.checkpoints.files import CheckpointError, read_tensors, write_tensors
from emca_bench.models.checkpoints.names import COUNTERS, IGNORED, recognised_file, to_transformers_names

NAMES = ("original", "transformers")


@dataclass(frozen=True)
class Conversion:
    """What was read and written.

    Attributes:
        source, target: files.
        naming: whose names the source had.
        names: whose names the target has.
        read, written: numbers of tensors; they differ where one tensor here is three there, and by counters of batch norms.
        left_out: tensors of the source that the target has no name for, and that no model needs.
    """

    source: Path
    target: Path
    naming: str
    names: str
    read: int
    written: int
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.source}: {self.read} tensors, names of {self.naming}",
            f"{self.target}: {self.written} tensors, names {self.names}",
        ]
        if self.left_out:
            lines.append(f"left out, no model needs them: {', '.join(self.left_out)}")
        return "\n".join(lines)


def convert(source: str | Path, target: str | Path, *, names: str = "original") -> Conversion:
    """Write a checkpoint in the format of the target's suffix under the names asked for.

    Args:
        source: see `read_tensors`; any naming that `to_original_names` knows.
        target: see `write_tensors`.
        names: "original", those of facebookresearch/Mask2Former and of this project, or "transformers", Hugging Face's.

    Raises:
        CheckpointError: the source cannot be read or is of no known naming, a tensor has no name there, or the target cannot be written.
    """
    if names not in NAMES:
        raise UsageError(f"names={names!r}{did_you_mean(names, NAMES)}; expected one of {', '.join(NAMES)}")
    stored = read_tensors(source)
    found = recognised_file(source, stored)
    foreign = [name for name in found.tensors if name.startswith("model.")]
    strays = [name for name in foreign if not name.startswith(IGNORED) and not name.endswith(COUNTERS)]
    if strays:
        raise CheckpointError(f"checkpoint {source}: {len(strays)} tensors have no name in the original: {', '.join(strays[:5])}")
    tensors = {name: tensor for name, tensor in found.tensors.items() if name not in set(foreign)}
    if found.naming.startswith("Hugging Face"):
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(COUNTERS)}
    if names == "transformers":
        tensors = to_transformers_names(tensors)
    write_tensors(tensors, target)
    return Conversion(Path(source), Path(target), found.naming, names, len(stored), len(tensors), tuple(foreign))
