// pybind11 module _C.
#include "bindings.h"

#include <pybind11/stl.h>

#include "cpu/isa.h"
#include "cpu/pages.h"
#include "parallel.h"

PYBIND11_MODULE(_C, module) {
  module.def("set_parallel_for", [](uintptr_t address) { minirl::g_parallel_for = (minirl::ParallelFor)address; });
  module.def("isa_built", minirl::isa_built);
  module.def("isa_supported", minirl::isa_supported);
  module.def("isa_picked", minirl::isa_name);
  module.def("set_isa", minirl::set_isa);
  module.def("release_pages", [](uintptr_t begin, int64_t bytes) { minirl::release_pages(begin, bytes); });
  minirl::bind_losses(module);
  minirl::bind_moe(module);
  minirl::bind_layers(module);
}
