// What the bindings of all kernels share. The Python side has checked shapes and dtypes.
#pragma once
#include <pybind11/pybind11.h>

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

#include "cpu/logits.h"

namespace minirl {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline DType dtype_of(const std::string& name) {
  if (name == "torch.float32") return DType::kFloat32;
  if (name == "torch.bfloat16") return DType::kBFloat16;
  if (name == "torch.float16") return DType::kFloat16;
  throw std::invalid_argument("dtype is " + name + ": it must be torch.float32, torch.bfloat16 or torch.float16");
}

template <class Enum>
Enum choice(const char* what, const std::string& name, std::initializer_list<std::pair<const char*, Enum>> choices) {
  for (const auto& [known, value] : choices)
    if (name == known) return value;
  throw std::invalid_argument(std::string(what) + " is '" + name + "', which the kernel does not have");
}

// Each adds its functions to the module.
void bind_losses(pybind11::module_& module);
void bind_moe(pybind11::module_& module);
void bind_layers(pybind11::module_& module);

}  // namespace minirl
