// The softcap of logits.
#include "cpu/softcap.h"
#include "bindings/binding.h"
#include "bindings/logits.h"

namespace py = pybind11;
using minirl::rows_of;
using minirl::Tensor;

namespace {

void softcap(const Tensor& logits, float cap) {
  logits.as<float>();  // raises for another dtype
  const minirl::SoftcapLogits args = {rows_of(logits), cap};
  minirl::run_rows(args.logits, MINIRL_PICK(minirl::softcap, minirl::SoftcapLogits), args);
}

const minirl::Binding softcap_binding([](py::module_& module) { module.def("softcap", softcap); });

}  // namespace
