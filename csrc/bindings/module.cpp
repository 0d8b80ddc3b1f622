// pybind11 module _C.
#include "bindings/binding.h"

#include <pybind11/stl.h>

#include <vector>

#include "cpu/isa.h"
#include "cpu/pages.h"
#include "parallel.h"

namespace {

using Add = void (*)(pybind11::module_&);

// Filled before the module is made, by the constructors of the files.
std::vector<Add>& all_bindings() {
  static std::vector<Add> all;
  return all;
}

}  // namespace

minirl::Binding::Binding(void (*add)(pybind11::module_&)) { all_bindings().push_back(add); }

PYBIND11_MODULE(_C, module) {
  module.def("set_parallel_for", [](uintptr_t address) { minirl::g_parallel_for = (minirl::ParallelFor)address; });
  module.def("isa_built", minirl::isa_built);
  module.def("isa_supported", minirl::isa_supported);
  module.def("isa_picked", minirl::isa_name);
  module.def("set_isa", minirl::set_isa);
  module.def("release_pages", [](uintptr_t begin, int64_t bytes) { minirl::release_pages(begin, bytes); });
  for (const Add add : all_bindings()) add(module);
}
