"""Pickles of numpy arrays and plain containers, and of nothing else: what is read can name no function that would run.

Even numpy's own constructors are not called. Stand-ins collect what the file says of an array, and `numpy.frombuffer` makes it from a
dtype of a closed list, so that no crafted state of a numpy object is ever restored.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import IO, Any

import numpy as np

DTYPES = {name: np.dtype(name) for name in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")}


class RefusedPickleError(pickle.UnpicklingError):
    """The pickle names something else than arrays and plain containers; nothing of it was run."""


class _Dtype:
    """What a pickle says of a dtype: its name, then its byte order."""

    __slots__ = ("dtype",)

    def __init__(self, name: Any, align: Any = False, copy: Any = True) -> None:
        if not isinstance(name, str) or name not in DTYPES:
            raise RefusedPickleError(f"an array of dtype {name!r}; expected one of {', '.join(DTYPES)}")
        self.dtype = DTYPES[name]

    def __setstate__(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if order not in ("<", ">", "|", "="):
            raise RefusedPickleError(f"a dtype of byte order {order!r}")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """What a pickle says of an array: shape, dtype, order and bytes."""

    __slots__ = ("array",)

    def __init__(self, *_: Any) -> None:
        self.array = np.empty(0)

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise RefusedPickleError("an array with a state of another form than numpy's")
        _, shape, dtype, fortran, data = state
        self.array = _array(data, dtype, shape, "F" if fortran else "C")


def _array(data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    if isinstance(data, str):  # bytes of a pickle that Python 2 wrote
        data = data.encode("latin1")
    sizes_fit = isinstance(shape, tuple) and all(isinstance(size, int) and size >= 0 for size in shape)
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray) or not sizes_fit or order not in ("C", "F"):
        raise RefusedPickleError("an array of another form than numpy's")
    flat = np.frombuffer(data, dtype.dtype)
    if flat.size != int(np.prod(shape, dtype=object)):
        raise RefusedPickleError(f"an array of shape {shape} with {flat.size} values")
    return flat.reshape(shape, order="F" if order == "F" else "C")


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    restored = _Array()
    restored.array = _array(data, dtype, shape, order)
    return restored


def _scalar(dtype: Any, data: Any) -> _Array:
    return _frombuffer(data, dtype, (), "C")


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise RefusedPickleError(f"text in the encoding {encoding!r}")
    return text.encode("latin1")


def _no_bytes(*arguments: Any) -> bytes:
    if arguments:
        raise RefusedPickleError("a call of bytes with arguments")
    return b""


class _StandIn:
    """A function of the closed list, without attributes that a pickle could set."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise RefusedPickleError("the state of a function")


STAND_INS: dict[str, Callable[..., Any]] = {"collections.OrderedDict": dict, "numpy.dtype": _Dtype, "numpy.ndarray": _Array}
STAND_INS |= {"_codecs.encode": _encode, "__builtin__.bytes": _no_bytes, "builtins.bytes": _no_bytes}
for _core in ("numpy.core", "numpy._core"):
    STAND_INS |= {f"{_core}.multiarray._reconstruct": _Array, f"{_core}.multiarray.scalar": _scalar}
    STAND_INS |= {f"{_core}.numeric._frombuffer": _frombuffer}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        qualified = f"{module}.{name}"
        if qualified not in STAND_INS:
            raise RefusedPickleError(qualified)
        return _StandIn(STAND_INS[qualified])

    def persistent_load(self, pid: Any) -> Any:
        raise RefusedPickleError("an object stored outside of the pickle, as torch.save does")


def restricted_load(file: IO[bytes]) -> Any:
    """Arrays (as numpy arrays, scalars as arrays without axes), numbers, text and plain containers of a pickle.

    Raises:
        RefusedPickleError: anything else is named; its message says what.
        pickle.UnpicklingError, EOFError, ...: the file is torn or no pickle.
    """
    return _plain(_Unpickler(file, encoding="latin1").load())


def _plain(value: Any) -> Any:
    if isinstance(value, _Array):
        return value.array
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return type(value)(_plain(entry) for entry in value)
    if isinstance(value, _Dtype | _StandIn):
        raise RefusedPickleError(f"a {type(value).__name__.strip('_').lower()} outside of an array")
    return value
