"""Triton's interpreter without its repeated bookkeeping, which takes most of its time.

In every statement the interpreter describes the types and shapes of the operands anew, and every call of a device
function prepares triton.language anew. Here it does so once for each distinct value. The arithmetic is its own.
"""

from __future__ import annotations

import functools
from typing import Any

import triton
from triton import language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_prepare_language = functools.cache(interpreter._patch_lang)
_patch_member = interpreter._patch_attr
_dtype_of = interpreter._get_np_dtype
_describe_block = tl.block_type.__init__
_describe_tensor = tl.tensor.__init__
_promote = TritonSemantic.computation_type_impl
_match_operands = TritonSemantic.binary_op_type_checking_impl
_broadcast = TritonSemantic.broadcast_impl_value
_cast = TritonSemantic.cast
_constant = TritonSemantic.scalar_constant

_dtypes: dict[str, Any] = {}
_blocks: dict[tuple, dict[str, Any]] = {}  # the attributes of a type, by dtype and shape
_promoted: dict[tuple, tl.dtype] = {}
_constants: dict[tuple, tl.tensor] = {}


def install() -> None:
    """From now on in this process; nothing changes where Triton compiles."""
    if not triton.knobs.runtime.interpret:
        return
    interpreter.InterpretedFunction.__call__ = _call_device_function
    interpreter._patch_attr = _patch_member_itself
    interpreter._get_np_dtype = _dtype_of_once
    tl.block_type.__init__ = _describe_block_once
    tl.tensor.__init__ = _describe_tensor_once
    TritonSemantic.computation_type_impl = _promote_once
    TritonSemantic.binary_op_type_checking_impl = _match_unlike_operands
    TritonSemantic.broadcast_impl_value = _broadcast_unlike_shapes
    TritonSemantic.cast = _cast_unlike_types
    TritonSemantic.scalar_constant = _constant_once


def _call_device_function(self, *args, **kwargs):
    _prepare_language(self.fn)
    return self.rewrite()(*args, **kwargs)


def _patch_member_itself(owner, name, member, *rest):
    """The member without its check for an argument that the interpreter always gives."""
    return _patch_member(owner, name, getattr(member, "__wrapped__", member), *rest)


def _dtype_of_once(dtype):
    scalar = dtype.scalar
    if scalar.name not in _dtypes:
        _dtypes[scalar.name] = _dtype_of(scalar)
    return _dtypes[scalar.name]


def _describe_block_once(self, element_ty, shape):
    sizes = (*[size.value if isinstance(size, tl.constexpr) else size for size in shape],)
    key = (element_ty.name, sizes)
    if key not in _blocks:
        _describe_block(self, element_ty, shape)
        _blocks[key] = self.__dict__ | {"sizes": sizes, "of_tensor": _shape_and_size(self)}
    self.__dict__ = _blocks[key]


def _shape_and_size(type):
    tensor = tl.tensor.__new__(tl.tensor)
    _describe_tensor(tensor, None, type)
    return {"shape": tensor.shape, "numel": tensor.numel}


_of_scalar = _shape_and_size(tl.int32)


def _describe_tensor_once(self, handle, type):
    self.__dict__.update(type.of_tensor if type.is_block() else _of_scalar)
    self.handle, self.type, self.dtype = handle, type, type.scalar


def _promote_once(self, a, a_is_scalar, b, b_is_scalar, div_or_mod):
    key = (a.name, a_is_scalar, b.name, b_is_scalar, div_or_mod)
    if key not in _promoted:
        _promoted[key] = _promote(self, a, a_is_scalar, b, b_is_scalar, div_or_mod)
    return _promoted[key]


def _match_unlike_operands(self, a, b, allow_a_ptr=False, allow_b_ptr=False, arithmetic_check=True, div_or_mod=False):
    if _are_alike(a, b) and (not arithmetic_check or _keeps_its_dtype(self, a.dtype, div_or_mod)):
        return self.broadcast_impl_value(a, b)
    return _match_operands(self, a, b, allow_a_ptr, allow_b_ptr, arithmetic_check, div_or_mod)


def _are_alike(a, b):
    both = isinstance(a, tl.tensor) and isinstance(b, tl.tensor)
    return both and a.dtype.name == b.dtype.name and not a.dtype.is_ptr()


def _keeps_its_dtype(semantic, dtype, div_or_mod):
    return _promote_once(semantic, dtype, False, dtype, False, div_or_mod) == dtype  # a 16-bit quotient has 32 bits


def _broadcast_unlike_shapes(self, a, b):
    if getattr(a.type, "sizes", None) == getattr(b.type, "sizes", None):
        return a, b
    return _broadcast(self, a, b)


def _cast_unlike_types(self, input, dst_ty, *rounding):
    return input if input.dtype.name == dst_ty.scalar.name else _cast(self, input, dst_ty, *rounding)


def _constant_once(self, value, dtype):
    key = (type(value), value, dtype.name)
    if key not in _constants:
        _constants[key] = _constant(self, value, dtype)
    return _constants[key]
