// A file of this folder adds its functions to the module by one Binding, so that no list names the files. Functions
// take records: of tensors (tensor.h) and of options (options.h). The Python side has checked the shapes.
#pragma once
#include "options.h"
#include "tensor.h"

namespace minirl {

struct Binding {
  explicit Binding(void (*add)(pybind11::module_&));
};

}  // namespace minirl
