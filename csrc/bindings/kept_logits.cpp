// Logits outside of a set become -inf.
#include "cpu/kept_logits.h"
#include "bindings/binding.h"
#include "bindings/logits.h"

namespace py = pybind11;
using minirl::Data;
using minirl::rows_of;
using minirl::Tensor;

namespace {

void kept_logits(const Tensor& logits, Data<int32_t> ids, Data<int32_t> begin, Data<int32_t> end) {
  const minirl::KeptLogits args = {rows_of(logits), ids, begin, end};
  minirl::run_rows(args.logits, MINIRL_PICK(minirl::kept_logits, minirl::KeptLogits), args);
}

const minirl::Binding kept_logits_binding([](py::module_& module) { module.def("kept_logits", kept_logits); });

}  // namespace
