"""How the contenders are called and ordered wherever a reader meets them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from emca_bench.specs import Arm, Study

LABELS = {
    "hugging_face": "Hugging Face",
    "masked": "masked (as published)",
    "masked_published": "masked (published)",
    "masked_fused": "masked (fused)",
    "masked_features": "masked (resized features)",
    "masked_full_masks": "masked (full masks)",
    "masked_sampled_masks": "masked (sampled masks)",
    "masked_exact_rewrites": "masked (exact rewrites)",
    "masked_compiled": "masked (compiled)",
    "masked_onnxruntime": "masked (onnxruntime)",
    "masked_cuda_graph": "masked (CUDA graph)",
    "masked_bf16": "masked (bfloat16)",
    "masked_flex": "masked (FlexAttention)",
    "emca_as_written": "EMCA as written",
    "emca": "EMCA (folded)",
    "emca_features": "EMCA (resized features)",
    "emca_sampled_masks": "EMCA (sampled masks)",
    "emca_exact_rewrites": "EMCA (exact rewrites)",
    "emca_compiled": "EMCA (compiled)",
    "emca_onnxruntime": "EMCA (onnxruntime)",
    "emca_bf16": "EMCA (bfloat16)",
    "emca_rawres": "EMCA (raw residual)",
    "emca_raw": "EMCA (raw residual)",
    "argmax_soft_gradient": "EMCA (soft gradient)",
    "pool_and_prototype": "mean and prototype",
    "pool_soft_gradient": "mean and prototype (soft gradient)",
    "emca_stride_32": "EMCA at stride 32",
    "emca_stride_16": "EMCA at stride 16",
    "emca_stride_8": "EMCA at stride 8",
    "topk_mean_16": "EMCA (mean of 16)",
    "masked_one_layer": "masked (one layer)",
    "emca_soft": "EMCA soft",
    "soft_feature_heads": "EMCA soft (heads)",
    "feature_heads": "EMCA soft (8 heads)",
    "key_heads_plain": "softmax (key heads)",
    "feature_heads_plain": "softmax (feature heads)",
    "mask_pooling": "mask pooling",
    "mask_pooling_raw": "mask pooling (raw residual)",
    "mask_pooling_winner": "mask pooling (winner, raw residual)",
    "mask_mean": "mask mean",
    "pem_ca": "PEM-CA",
    "pem_ca_published": "PEM-CA (as published)",
    "pem_ca_mended": "PEM-CA (mended)",
    "none_exact_rewrites": "none (exact rewrites)",
    "none": "none",
    "eager": "eager torch",
    "grid_sample": "grid_sample",
    "ms_deform_attn": "torch-ms-deform-attn",
    "scores_only": "scores alone (bmm)",
    "native": "native C++",
    "native_from_offsets": "native C++ (from offsets)",
    "triton": "Triton",
    "cuda": "CUDA C++",
}
"""Words for the arms of the standard studies, in reading order; `label` spells any other arm."""

WORDS = {
    "emca": "EMCA",
    "pem": "PEM",
    "ca": "CA",
    "cuda": "CUDA",
    "ffn": "FFN",
    "bf16": "bfloat16",
    "fp16": "float16",
    "topk": "top-K",
    "r50": "R50",
    "r101": "R101",
    "swin": "Swin",
    "t": "T",
    "l": "L",
    "ade": "ADE20K",
    "city": "Cityscapes",
    "coco": "COCO",
    "proj": "projected",
}
"""Parts of arm names that are not spelled as they are pronounced."""


def label(name: str) -> str:
    """What figures print for an arm: its words, or its name part by part."""
    return LABELS.get(name) or " ".join(WORDS.get(part, part) for part in name.split("_"))


def in_reading_order(names: Iterable[str]) -> list[str]:
    """Known arms first, in the order of `LABELS`, then the others as they come; each once."""
    distinct = list(dict.fromkeys(names))
    known = [name for name in LABELS if name in distinct]
    return known + [name for name in distinct if name not in LABELS]


def arm_named(arms: Iterable[Arm], attention: str) -> str | None:
    """The arm that stands for an attention: of that name, else the first that uses it, else None."""
    using = [arm.name for arm in arms if arm.attention == attention]
    if attention in using:
        return attention
    return using[0] if using else None


def subject(study: Study) -> str | None:
    """The arm that the study is about: EMCA, else the first arm that is no baseline."""
    others: Sequence[str] = [arm.name for arm in study.arms if arm.name not in study.baselines and arm.attention != "none"]
    return arm_named(study.arms, "emca") or (others[0] if others else None)
