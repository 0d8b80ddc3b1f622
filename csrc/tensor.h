// Records of tensors. Python passes a torch.Tensor, and a type caster reads the record from its attributes: this costs
// less per call than a tuple made in Python, and needs no header of torch.
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/strided_rows.h"

namespace minirl {

// "a, b or c"
inline std::string listed(const std::vector<std::string>& names) {
  std::string text;
  for (size_t i = 0; i < names.size(); ++i) text += (i == 0 ? "" : i + 1 < names.size() ? ", " : " or ") + names[i];
  return text;
}

// Raises for a dtype that a kernel does not take; `dtype` is torch's object.
[[noreturn]] inline void refuse_dtype(PyObject* dtype, const std::vector<std::string>& taken) {
  throw std::invalid_argument("dtype is " + std::string(pybind11::str(dtype)) + ": it must be " + listed(taken));
}

#define MINIRL_NAME(kind, type, name) name,
inline std::vector<std::string> float_names() { return {MINIRL_FOR_EACH_FLOAT(MINIRL_NAME)}; }
inline std::vector<std::string> integer_names() { return {MINIRL_FOR_EACH_INTEGER(MINIRL_NAME)}; }
#undef MINIRL_NAME

// kOther for a dtype that no kernel takes. Each of torch's dtypes is one object, which is asked for its name once.
inline DType dtype_of(PyObject* dtype) {
  static std::vector<std::pair<PyObject*, DType>> known;
  for (const auto& [object, kind] : known)
    if (object == dtype) return kind;
  const std::string text = pybind11::str(dtype);
  DType found = DType::kOther;
#define MINIRL_FIND(kind, type, name) \
  if (text == name) found = DType::kind;
  MINIRL_FOR_EACH_DTYPE(MINIRL_FIND)
#undef MINIRL_FIND
  Py_INCREF(dtype);  // no other object gets its address
  known.emplace_back(dtype, found);
  return found;
}

// An attribute of a Python object, and the result of a method without arguments, by an interned name.
inline pybind11::object attribute(pybind11::handle object, PyObject* name) {
  PyObject* const result = PyObject_GetAttr(object.ptr(), name);
  if (!result) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(result);
}
inline pybind11::object call(pybind11::handle object, PyObject* name) {
  PyObject* const result = PyObject_CallMethodNoArgs(object.ptr(), name);
  if (!result) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(result);
}

inline void* address_of(pybind11::handle tensor) {
  static PyObject* const name = PyUnicode_InternFromString("data_ptr");
  return PyLong_AsVoidPtr(call(tensor, name).ptr());
}
inline PyObject* dtype_object(pybind11::handle tensor) {
  static PyObject* const name = PyUnicode_InternFromString("dtype");
  return attribute(tensor, name).ptr();
}

// Raises where torch's dtype is not T.
template <class T>
void check_dtype(PyObject* dtype) = delete;
#define MINIRL_CHECK_DTYPE(kind, type, name)                         \
  template <>                                                        \
  inline void check_dtype<type>(PyObject * dtype) {                  \
    if (dtype_of(dtype) != DType::kind) refuse_dtype(dtype, {name}); \
  }
MINIRL_FOR_EACH_DTYPE(MINIRL_CHECK_DTYPE)
#undef MINIRL_CHECK_DTYPE

// A tensor's address and dtype.
struct Elements {
  static constexpr bool kMayBeNone = false;

  void* data = nullptr;
  PyObject* torch_dtype = nullptr;
  DType dtype = DType::kOther;

  void read(pybind11::handle tensor) {
    data = address_of(tensor);
    torch_dtype = dtype_object(tensor);
    dtype = dtype_of(torch_dtype);
  }

  template <class T>
  T* as() const {
    check_dtype<T>(torch_dtype);
    return static_cast<T*>(data);
  }
  DType float_dtype() const {
    if (!is_float(dtype)) refuse_dtype(torch_dtype, float_names());
    return dtype;
  }
  DType integer_dtype() const {
    if (!is_integer(dtype)) refuse_dtype(torch_dtype, integer_names());
    return dtype;
  }
};

// A tensor's address, dtype, sizes and strides in elements.
struct Tensor : Elements {
  static constexpr int64_t kMostDims = 64;

  int64_t dims = 0;
  int64_t sizes[kMostDims], strides[kMostDims];

  void read(pybind11::handle tensor) {
    static PyObject* const shape_name = PyUnicode_InternFromString("shape");
    static PyObject* const stride_name = PyUnicode_InternFromString("stride");
    Elements::read(tensor);
    const pybind11::object shape = attribute(tensor, shape_name), stride = call(tensor, stride_name);
    dims = PyTuple_GET_SIZE(shape.ptr());
    if (dims > kMostDims)
      throw std::invalid_argument("a tensor has " + std::to_string(dims) + " dimensions: it must have at most 64");
    for (int64_t i = 0; i < dims; ++i) {
      sizes[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i));
      strides[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(stride.ptr(), i));
    }
  }

  // `dim` counts from the end: -1 is the last dimension. Size and stride of a dimension that is missing are 0.
  int64_t size(int64_t dim) const { return dims + dim < 0 ? 0 : sizes[dims + dim]; }
  int64_t stride(int64_t dim) const { return dims + dim < 0 ? 0 : strides[dims + dim]; }
  int64_t numel() const {
    int64_t product = 1;
    for (int64_t i = 0; i < dims; ++i) product *= sizes[i];
    return product;
  }
};

// The same or None, whose address is null.
struct OptionalTensor : Tensor {
  static constexpr bool kMayBeNone = true;
};

// The address of a contiguous tensor of T, whose shape the caller knows. `void` is any dtype.
template <class T>
struct Data {
  static constexpr bool kMayBeNone = false;
  T* data = nullptr;

  void read(pybind11::handle tensor) {
    data = static_cast<T*>(address_of(tensor));
    if constexpr (!std::is_void_v<T>) check_dtype<T>(dtype_object(tensor));
  }
  operator T*() const { return data; }
};
// The same or None, whose address is null.
template <class T>
struct OptionalData : Data<T> {
  static constexpr bool kMayBeNone = true;
};

// A float tensor [..., size] as rows, without a copy. Raises where a row is not contiguous, or where the rows lie apart
// by more than two strides.
inline StridedRows rows_of(const Tensor& x) {
  int64_t sizes[2] = {1, 1}, strides[2] = {0, 0};
  int levels = 0;
  for (int64_t dim = x.dims - 2; dim >= 0; --dim) {
    if (x.sizes[dim] == 1) continue;
    if (levels > 0 && x.strides[dim] == sizes[levels - 1] * strides[levels - 1]) {
      sizes[levels - 1] *= x.sizes[dim];
      continue;
    }
    if (levels == 2) throw std::invalid_argument("the rows of a tensor lie apart by more than two strides");
    sizes[levels] = x.sizes[dim];
    strides[levels++] = x.strides[dim];
  }
  if (x.size(-1) > 1 && x.stride(-1) != 1) throw std::invalid_argument("the rows of a tensor are not contiguous");
  return {x.data, x.float_dtype(), sizes[0] * sizes[1], x.size(-1), sizes[0], strides[1], strides[0]};
}

// For None pybind11 raises TypeError, unless the record may be None.
template <class Record>
struct RecordCaster {
  PYBIND11_TYPE_CASTER(Record, pybind11::detail::const_name("torch.Tensor"));
  bool load(pybind11::handle source, bool) {
    if (source.is_none()) return Record::kMayBeNone;
    value.read(source);
    return true;
  }
};

}  // namespace minirl

namespace pybind11::detail {
template <>
struct type_caster<minirl::Elements> : minirl::RecordCaster<minirl::Elements> {};
template <>
struct type_caster<minirl::Tensor> : minirl::RecordCaster<minirl::Tensor> {};
template <>
struct type_caster<minirl::OptionalTensor> : minirl::RecordCaster<minirl::OptionalTensor> {};
template <class T>
struct type_caster<minirl::Data<T>> : minirl::RecordCaster<minirl::Data<T>> {};
template <class T>
struct type_caster<minirl::OptionalData<T>> : minirl::RecordCaster<minirl::OptionalData<T>> {};
}  // namespace pybind11::detail
