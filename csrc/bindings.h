// The bindings take records: of tensors (tensor.h) and of options (options.h). The Python side has checked the shapes.
#pragma once
#include "options.h"
#include "tensor.h"

namespace minirl {

// Each adds its functions to the module.
void bind_losses(pybind11::module_& module);
void bind_moe(pybind11::module_& module);
void bind_layers(pybind11::module_& module);

}  // namespace minirl
