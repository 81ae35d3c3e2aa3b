"""What a study may set: parameters with their meaning, and the few words that some of them take."""

from __future__ import annotations

import re

from emca_bench.errors import UsageError

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
    "mask_rule": (str, "pixels a query may attend to: threshold, those of its mask, the default; winner, where its logit is the greatest"),
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


def parse_size(text: str, *, what: str = "size") -> tuple[int, int]:
    """`"64x128"` to (height, width) in pixels; UsageError for anything else."""
    match = _SIZE.match(text)
    if match is None:
        raise UsageError(f"{what} {text!r} is not of the form HEIGHTxWIDTH, for example 64x128")
    return int(match[1]), int(match[2])
