// Records of options: any Python object whose attributes have the names of the fields.
#pragma once
#include <initializer_list>
#include <utility>

#include "tensor.h"

namespace minirl {

// One field of a record. A record without it raises AttributeError, a value of another type ValueError.
template <class T>
class Field {
 public:
  explicit Field(const char* name) : name_(PyUnicode_InternFromString(name)) {}

  T operator()(pybind11::handle record) const {
    const pybind11::object value = attribute(record, name_);
    pybind11::detail::make_caster<T> caster;
    if (!caster.load(value, true))
      throw std::invalid_argument(std::string(pybind11::str(name_)) + " is " + std::string(pybind11::repr(value)) +
                                  ", which is of another type than the kernel takes");
    return pybind11::detail::cast_op<T>(std::move(caster));
  }

 private:
  PyObject* name_;  // interned, so that the look-up compares addresses
};

// The choice that has this name. `what` is the argument that an error names.
template <class Enum>
Enum choice(const char* what, const std::string& name, std::initializer_list<std::pair<const char*, Enum>> choices) {
  for (const auto& [known, value] : choices)
    if (name == known) return value;
  throw std::invalid_argument(std::string(what) + " is '" + name + "', which the kernel does not have");
}

}  // namespace minirl
