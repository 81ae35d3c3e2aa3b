"""A run folder as the runner leaves it, with numbers drawn from a simple model of the machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from emca_bench.records import Record
from emca_bench.report.build import render
from emca_bench.specs import Arm, Cell, Expected, Settings, Study, canonical_json, dump_lock, parse_size

CONTEXT = "1f0c5a77"
ENVIRONMENT = {
    "identity": {
        "cpu": "AMD EPYC 9B14",
        "cores": 2,
        "threads": 2,
        "isa": "AVX-512",
        "gpu": None,
        "os": "Linux 6.1",
        "python": "3.11.2",
        "torch": "2.13.0",
        "numpy": "2.4.6",
    },
    "state": {
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "git_dirty": False,
        "load_average": 0.4,
        "started": "2026-11-23T04:00:00Z",
    },
    "command": "emca-bench run reproduce",
}
CLASSES = ["sky", "building", "road", "tree", "car", "pole"]
COLORS = [(70, 130, 180), (140, 110, 100), (128, 64, 128), (107, 142, 35), (0, 0, 142), (220, 170, 30)]
MACS_PER_PIXEL = {"masked": 182272, "masked_fused": 182272, "emca_as_written": 91136, "emca": 25600, "emca_soft": 51200}
MACS_PER_PIXEL |= {"mask_pooling": 25600, "pem_ca": 93440, "none": 0}
MIOU = {"masked": 61.5, "emca": 60.2, "emca_soft": 61.4, "mask_pooling": 61.0, "none": 54.0, "emca_rawres": 60.8}
ATTENTION_ARMS = ("masked", "masked_fused", "emca_as_written", "emca", "emca_soft", "mask_pooling", "pem_ca")


def cost(arm: Arm) -> str:
    return arm.name if arm.name in MACS_PER_PIXEL else arm.attention


def arms(*names: str) -> tuple[Arm, ...]:
    special = {
        "emca_as_written": Arm(name="emca_as_written", attention="emca", switches={"folded": False}),
        "emca_rawres": Arm(name="emca_rawres", attention="emca", switches={"residual": "raw"}),
    }
    return tuple(special.get(name, Arm(name=name, attention=name)) for name in names)


def attention_study() -> Study:
    claim = Expected(
        claim="The EMCA module is nearly 1.2x faster than masked cross-attention",
        metric="speedup",
        value=1.2,
        tolerance=0.1,
        arm="emca_as_written",
        against=("masked", "masked_fused"),
        where={"pixels": "64x64"},
        source="Weerakoon & Thayasivam, Oct 2025, methodology",
    )
    return Study(
        name="attention",
        title="Cross-attention alone",
        question="From how many pixels on is prototype attention faster?",
        measures=("macs", "latency", "memory"),
        baselines=("masked", "masked_fused"),
        arms=arms(*ATTENTION_ARMS),
        axes={"pixels": ("16x16", "32x32", "64x64", "64x128", "128x128", "128x256")},
        fixed={"scope": "attention", "device": "cpu", "dtype": "float32", "batch": 1, "queries": 100, "width": 256, "allowed": 0.25},
        settings=Settings(rounds=7),
        expected=(claim,),
    )


def flops_study() -> Study:
    return Study(
        name="flops",
        title="Multiply-adds",
        question="Which share of the model is the cross-attention?",
        measures=("macs",),
        baselines=("masked",),
        arms=(
            *arms("masked", "emca", "emca_soft", "none"),
            Arm(name="emca_features", attention="emca", overrides={"mask_source": "features"}),
        ),
        axes={"model": ("mask2former_r50", "mask2former_lite0"), "image_size": ("512x512", "1024x2048")},
        fixed={"scope": "model", "device": "cpu", "dtype": "float32", "batch": 1, "classes": 150, "queries": 100, "mask_source": "logits"},
        settings=Settings(),
    )


def fps_study() -> Study:
    shared = {"arm": "emca", "source": "Weerakoon & Thayasivam, Oct 2025, conclusion", "where": {"scope": "end_to_end"}}
    return Study(
        name="fps",
        title="Frames per second",
        question="How much faster is the whole model?",
        measures=("latency", "memory"),
        baselines=("masked", "masked_fused"),
        arms=arms("masked", "masked_fused", "emca", "emca_soft", "mask_pooling", "none"),
        axes={"scope": ("decoder", "model", "end_to_end"), "image_size": ("256x256", "512x512")},
        fixed={"model": "mask2former_lite0", "device": "cpu", "dtype": "float32", "batch": 1, "classes": 150, "queries": 100},
        settings=Settings(rounds=7),
        expected=(
            Expected(claim="1.13x speedup on ADE20K", metric="speedup", value=1.13, against=("masked", "masked_fused"), **shared),
            Expected(claim="33.7 FPS with EMCA", metric="fps", value=33.7, **shared),
        ),
    )


def accuracy_study() -> Study:
    shared = {"arm": "emca", "source": "Weerakoon & Thayasivam, Oct 2025, conclusion", "dataset": "ade20k"}
    return Study(
        name="accuracy",
        title="Accuracy after a short training",
        question="What does the cheaper attention cost in mIoU?",
        measures=("accuracy",),
        baselines=("masked",),
        arms=arms("masked", "emca", "emca_soft", "emca_rawres", "mask_pooling", "none"),
        axes={"dataset": ("scenes", "camvid"), "seed": (0, 1, 2, 3, 4)},
        fixed={
            "scope": "model",
            "model": "mask2former_lite0",
            "device": "cpu",
            "dtype": "float32",
            "batch": 8,
            "steps": 800,
            "image_size": "128x128",
            "classes": 6,
            "train_images": 0,
            "test_images": 0,
        },
        settings=Settings(),
        expected=(
            Expected(claim="45.1 mIoU with EMCA", metric="miou", value=45.1, tolerance=0.5, **shared),
            Expected(claim="+0.5 mIoU over Mask2Former", metric="miou_difference", value=0.5, tolerance=0.5, against=("masked",), **shared),
        ),
    )


def all_studies() -> list[Study]:
    return [attention_study(), flops_study(), fps_study(), accuracy_study()]


def quick(study: Study) -> Study:
    axes = {name: values[:3] if name == "pixels" else values[:1] if name == "seed" else values for name, values in study.axes.items()}
    return replace(study, axes=axes, settings=Settings(rounds=2), quick=True)


class Machine:
    """Draws records: latencies drift from round to round, calls scatter around their round."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.drift = np.exp(np.cumsum(self.random.normal(0, 0.03, 64)))

    def record(self, cell: Cell, measure: str, index: int) -> Record:
        values, samples = getattr(self, measure)(cell, index)
        params = dict(cell.params)
        return Record(
            context=CONTEXT,
            study=cell.study,
            key=cell.key(measure),
            measure=measure,
            arm=cell.arm.name,
            params=params,
            round=index,
            status="ok",
            values=values,
            samples=samples,
            duration_s=0.4,
        )

    def macs(self, cell: Cell, index: int) -> tuple[dict[str, Any], dict[str, list[float]]]:
        if cell.params["scope"] == "attention":
            height, width = parse_size(str(cell.params["pixels"]))
            macs = MACS_PER_PIXEL[cost(cell.arm)] * height * width + 26_000_000
            components = {"cross_attention": macs}
            return {
                "macs": macs,
                "closed_form_macs": macs - 900,
                "components": components,
                "parameters": 262_656,
                "uncounted": {"topk": 1},
            }, {}
        components = self.components(cell)
        macs = sum(components.values())
        counted = {
            "macs": macs,
            "closed_form_macs": components["cross_attention"],
            "components": components,
            "parameters": 44_000_000,
            "uncounted": {"grid_sample": 54},
        }
        return counted, {}

    def components(self, cell: Cell) -> dict[str, int]:
        height, width = parse_size(str(cell.params["image_size"]))
        pixels = height * width
        attention = MACS_PER_PIXEL[cost(cell.arm)] * 9 * pixels // 195
        heads = 3_200 * pixels if cell.arm.overrides else 16_000 * pixels
        backbone = 82_000 * pixels if "r50" in str(cell.params["model"]) else 8_000 * pixels
        return {
            "backbone": backbone,
            "pixel_decoder": 110_000 * pixels,
            "cross_attention": attention,
            "self_attention": 330_000_000,
            "ffn": 940_000_000,
            "mask_heads": heads,
            "other": 4_000_000,
        }

    def latency(self, cell: Cell, index: int) -> tuple[dict[str, Any], dict[str, list[float]]]:
        per_pixel = MACS_PER_PIXEL[cost(cell.arm)] * (1.6 if cell.arm.name == "masked" else 1.0)
        if cell.params["scope"] == "attention":
            height, width = parse_size(str(cell.params["pixels"]))
            overhead = {"masked": 0.25, "masked_fused": 0.12}.get(cell.arm.name, 1.3)
            expected = overhead + per_pixel * height * width / 9e7
        else:
            height, width = parse_size(str(cell.params["image_size"]))
            rest = {"decoder": 180_000, "model": 900_000, "end_to_end": 1_000_000}[str(cell.params["scope"])]
            expected = (rest + per_pixel / 2) * height * width / 9e8
        median = expected * self.drift[index] * self.random.lognormal(0, 0.01)
        samples = median * self.random.lognormal(0, 0.05, 9)
        return {"backends": {"select_prototypes": "reference (no native library)"}}, {"latency_ms": [float(value) for value in samples]}

    def memory(self, cell: Cell, index: int) -> tuple[dict[str, Any], dict[str, list[float]]]:
        size = str(cell.params.get("pixels") or cell.params["image_size"])
        height, width = parse_size(size)
        return {"peak_memory_bytes": int(height * width * (MACS_PER_PIXEL[cost(cell.arm)] / 50 + 600))}, {}

    def accuracy(self, cell: Cell, index: int) -> tuple[dict[str, Any], dict[str, list[float]]]:
        signal = 1.0 if cell.params["dataset"] == "scenes" else 0.05
        seeded = np.random.default_rng(int(cell.params["seed"]))
        center = 58 + (MIOU[cell.arm.name] - 58) * signal + seeded.normal(0, 0.6) + self.random.normal(0, 0.25)
        classes = {name: float(np.clip(center + self.random.normal(0, 12), 0, 100)) for name in CLASSES[:-1]} | {CLASSES[-1]: None}
        steps = [float(step) for step in range(0, 800, 10)]
        losses = [float(18 - (MIOU[cell.arm.name] - 50) / 8 + 30 * np.exp(-step / 120) + self.random.normal(0, 0.5)) for step in steps]
        values = {
            "miou": float(center),
            "class_iou": classes,
            "pixel_accuracy": float(center + 25),
            "frequency_miou": 7.9,
            "frequency_pixel_accuracy": 39.5,
            "train_seconds": float(700 + self.random.normal(0, 20)),
            "train_steps": 800,
            "train_images": 512,
            "test_images": 128,
            "image_size": "128x128",
            "parameters": 5_300_000,
            "final_loss": losses[-1],
            "pretrained": "tf_efficientnet_lite0 (ImageNet)",
        }
        return values, {"loss_step": steps, "loss": losses}


def records_of(studies: list[Study], *, seed: int = 0) -> Iterator[Record]:
    machine = Machine(seed)
    for study in studies:
        for measure in study.measures:
            rounds = study.settings.rounds if measure == "latency" else 1
            for index in range(rounds):
                for cell in study.cells():
                    yield machine.record(cell, measure, index)


def write_run(
    folder: Path,
    studies: list[Study] | None = None,
    *,
    seed: int = 0,
    artifacts: bool = True,
    change: Callable[[Record], Record | None] = lambda record: record,
    environment: dict[str, Any] | None = None,
) -> Path:
    """Write a run folder; `change` may alter a record on its way, or drop it."""
    studies = all_studies() if studies is None else studies
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.lock.json").write_text(dump_lock(studies))
    (folder / "environment.json").write_text(json.dumps({"current": CONTEXT, "environments": {CONTEXT: environment or ENVIRONMENT}}))
    changed = (change(record) for record in records_of(studies, seed=seed))
    lines = [canonical_json(asdict(record)) + "\n" for record in changed if record is not None]
    (folder / "records.jsonl").write_text("".join(lines))
    if artifacts:
        for study in studies:
            if "accuracy" in study.measures:
                write_artifacts(folder, study, seed)
    return folder


def write_artifacts(folder: Path, study: Study, seed: int) -> None:
    random = np.random.default_rng(seed)
    truths: dict[str, list[np.ndarray]] = {}
    for dataset in study.axes["dataset"]:
        base = folder / "artifacts" / str(dataset)
        base.mkdir(parents=True)
        classes = [{"name": name, "thing": name in ("car", "pole"), "color": color} for name, color in zip(CLASSES, COLORS, strict=True)]
        (base / "classes.json").write_text(json.dumps(classes))
        for number in range(3):
            truth = _scene(random)
            truths.setdefault(str(dataset), []).append(truth)
            image = np.array(COLORS, np.uint8)[np.minimum(truth, 5)] // 2 + random.integers(0, 120, (*truth.shape, 3), dtype=np.uint8)
            (base / f"{number:02d}").mkdir()
            Image.fromarray(image).save(base / f"{number:02d}" / "image.png")
            Image.fromarray(truth).save(base / f"{number:02d}" / "truth.png")
    for cell in study.cells():
        if cell.params["seed"] == study.axes["seed"][0]:
            target = folder / "artifacts" / "predictions" / cell.key("accuracy")
            target.mkdir(parents=True)
            for number, truth in enumerate(truths[str(cell.params["dataset"])]):
                Image.fromarray(_prediction(truth, random)).save(target / f"{number:02d}.png")


def _scene(random: np.random.Generator, height: int = 96, width: int = 128) -> np.ndarray:
    truth = np.zeros((height, width), np.uint8)
    horizon = int(random.integers(35, 55))
    truth[horizon:] = 2
    for left in random.integers(0, width - 30, 3):
        truth[int(random.integers(5, horizon - 10)) : horizon, left : left + 25] = 1
    left = int(random.integers(0, 90))
    truth[horizon - 15 : horizon + 5, left : left + 20] = 3
    truth[horizon + 8 : horizon + 24, 70:110] = 4
    truth[:4] = 255
    return truth


def _prediction(truth: np.ndarray, random: np.random.Generator) -> np.ndarray:
    moved = np.roll(truth, (int(random.integers(-4, 5)), int(random.integers(-4, 5))), (0, 1))
    return np.where(moved == 255, 0, moved).astype(np.uint8)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run folder below the test's own; arguments as `write_run`."""

    def make(studies: list[Study] | None = None, *, name: str = "run", **options: Any) -> Path:
        return write_run(tmp_path / name, studies, **options)

    return make


@pytest.fixture(scope="session")
def synthetic() -> SimpleNamespace:
    """The names of this module, for tests that build their own studies."""
    return SimpleNamespace(**globals())


@pytest.fixture(scope="session")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of all studies; tests only read it."""
    return write_run(tmp_path_factory.mktemp("full") / "run")


@pytest.fixture(scope="session")
def full_report(full_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the report of `full_run`; tests only read it."""
    return render(full_run, tmp_path_factory.mktemp("report")).markdown_path.parent
