"""Every branch of every kernel compiles for every architecture, without spills, within shared memory, onto tensor cores."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator
from typing import Any

import pytest
from emca_kernels.triton import inspection
from emca_kernels.triton.configs import SHARED_MEMORY_BYTES
from emca_kernels.triton.runtime import Launch, interpreting
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import jit

if interpreting():
    pytest.skip("interpreted kernels cannot be compiled: unset TRITON_INTERPRET", allow_module_level=True)

NAMES = [name for architecture in SHARED_MEMORY_BYTES for name, _ in inspection.variants(architecture)]
GOOD = {"registers": 100, "spilled_bytes": 0, "shared_memory_bytes": 1000, "tensor_core_instructions": 8, "instructions": 500}
NAME = "sm_80 select_prototypes_fwd bf16"


@pytest.fixture(scope="session")
def compiled() -> dict[str, dict[str, int]]:
    return inspection.inspect_all(os.cpu_count() or 1)


@pytest.mark.parametrize("name", NAMES)
def test_compiles_as_recorded(compiled: dict[str, dict[str, int]], name: str) -> None:
    recorded = inspection.recorded_for(importlib.metadata.version("triton"))
    assert inspection.complaints({name: compiled[name]}, recorded and {key: recorded[key] for key in recorded if key == name}) == []


def test_the_table_holds_what_is_compiled_and_nothing_else() -> None:
    recorded = inspection.recorded_for(importlib.metadata.version("triton"))
    assert recorded is None or set(recorded) == set(NAMES)


def compiled_for(launch: Launch) -> Iterator[tuple[str, object]]:
    """Names and values of what a kernel is compiled for, of tuples those of their members."""
    for parameter in launch.kernel.params:
        if parameter.is_constexpr:
            value = launch.arguments[parameter.name]
            if isinstance(value, tuple):
                yield from ((name, member.value) for name, member in value._asdict().items())
            else:
                yield parameter.name, value


@pytest.mark.parametrize("architecture", SHARED_MEMORY_BYTES)
def test_every_branch_is_among_them(architecture: int) -> None:
    reached: dict[tuple[str, str], set[object]] = {}
    for _, launch in inspection.variants(architecture):
        for name, value in compiled_for(launch):
            reached.setdefault((launch.kernel.fn.__name__, name), set()).add(value)
    for kernel in ("select_prototypes_fwd_kernel", "pool_prototypes_fwd_kernel"):
        assert reached[kernel, "HEADS"] == {1, 8}
    for kernel in ("select_prototypes_fwd_kernel", "pool_prototypes_fwd_kernel", "emca_attention_fwd_kernel"):
        assert reached[kernel, "MASK"] == {0, 1, 2, 3, 4}
        assert reached[kernel, "POSITION"] == reached[kernel, "RESIDENT"] == {True, False}
        assert reached[kernel, "MASK_RESIDENT"] == {True, False}
        # the interpreter alone needs it
        assert reached[kernel, "UPCAST"] == {False}
    for kernel in ("emca_attention_fwd_kernel", "emca_attention_merge_kernel"):
        assert reached[kernel, "SELECTION"] == {0, 1, 2}
        assert reached[kernel, "POSITION"] == {True, False}
    assert reached["emca_attention_fwd_kernel", "QUERY_POSITION"] == reached["emca_attention_fwd_kernel", "SCALED"] == {True, False}
    # an A100 holds no rows of 256 channels beside its tiles
    assert reached["emca_attention_fwd_kernel", "FOLD_ON_CHIP"] == {True, False}
    assert reached["emca_attention_merge_kernel", "PROJECTED_RESIDUAL"] == {True, False}
    assert reached["deformable_attention_fwd_kernel", "FROM_OFFSETS"] == {True, False}
    assert reached["select_prototypes_fwd_kernel", "K"] == {1, 2, 4, 8, 16}
    assert reached["pool_prototypes_fwd_kernel", "SOFT"] == reached["merge_sums_kernel", "SOFT"] == {True, False}


def bind(launch: Launch, architecture: int, keys: dict[Any, str]) -> tuple[str, tuple[Any, ...]]:
    """What Triton looks a launch up by, and what it would compile for it: its own path, which needs a device only from there on."""
    backend = make_backend(GPUTarget("cuda", architecture, 32))
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    binder = jit.create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    bound, specialization, others = binder(**launch.arguments, **options)
    key = jit.compute_cache_key(keys, specialization, others)
    return key, launch.kernel._pack_args(backend, {**launch.arguments, **options}, bound, specialization, others)[1:]


@pytest.mark.parametrize("architecture", SHARED_MEMORY_BYTES)
def test_a_launch_would_compile_what_is_compiled_here(architecture: int) -> None:
    for name, launch in inspection.variants(architecture):
        signature, constants, attributes = bind(launch, architecture, {})[1]
        source = inspection.source_of(launch)
        assert (name, signature, constants) == (name, source.signature, source.constants)
        assert {path: known for path, known in attributes.items() if known} == source.attrs


def test_an_equal_call_compiles_nothing_anew() -> None:
    keys: dict[Any, str] = {}
    once = {name: bind(launch, 90, keys)[0] for name, launch in inspection.variants(90)}
    known = len(keys)
    again = {name: bind(launch, 90, keys)[0] for name, launch in inspection.variants(90)}
    assert again == once
    assert len(keys) == known
    # each kernel looks its launches up among its own
    assert len({(launch.kernel.fn.__name__, once[name]) for name, launch in inspection.variants(90)}) == len(once)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"spilled_bytes": 8}, "spills 8 bytes"),
        ({"shared_memory_bytes": 163 * 1024 + 1}, "166913 bytes of shared memory, at most 166912"),
        ({"tensor_core_instructions": 0}, "no tensor-core instruction"),
        ({"registers": 111}, "111 registers, 100 recorded"),
    ],
)
def test_a_worse_kernel_is_a_complaint(change: dict[str, int], complaint: str) -> None:
    assert inspection.complaints({NAME: GOOD}, {NAME: GOOD}) == []
    assert inspection.complaints({NAME: GOOD | {"registers": 110}}, {NAME: GOOD}) == []
    assert f"{NAME}: {complaint}" in inspection.complaints({NAME: GOOD | change}, {NAME: GOOD})


def test_a_kernel_that_was_not_recorded_is_a_complaint_and_so_is_one_that_is_gone() -> None:
    assert inspection.complaints({NAME: GOOD}, {}) == [f"{NAME}: not in compiled.json; write it anew with --write"]
    assert inspection.complaints({}, {NAME: GOOD}) == [f"{NAME}: in compiled.json, but no longer compiled"]


def test_a_version_without_a_record_is_held_to_the_limits_alone() -> None:
    assert inspection.recorded_for("0.0") is None
    assert inspection.complaints({NAME: GOOD | {"registers": 250}}, None) == []
    assert inspection.complaints({NAME: GOOD | {"spilled_bytes": 4}}, None) == [f"{NAME}: spills 4 bytes"]
