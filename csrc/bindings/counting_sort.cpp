// The counting sort of experts on a GPU.
#ifdef MINIRL_HAVE_CUDA
#include "cuda/counting_sort.h"
#include "bindings/binding.h"

namespace py = pybind11;
using minirl::Data;
using minirl::Tensor;

namespace {

// On the current device, which holds all the tensors. places: [segments, num_keys] of scratch.
void counting_sort(const Tensor& keys, const Tensor& places, Data<int64_t> begins, Data<int64_t> order,
                   uintptr_t stream) {
  const int64_t segments = places.size(-2);
  if (segments < 1 || segments > minirl::kMostSegments) throw std::invalid_argument("segments do not fit in a block");
  const minirl::CountingSort sort = {
      keys.as<int64_t>(), keys.numel(), places.size(-1), segments, places.as<int64_t>(), begins, order};
  const char* const error = minirl::launch_counting_sort(sort, (void*)stream);
  if (error) throw std::runtime_error(std::string("the counting sort did not start on the GPU: ") + error);
}

const minirl::Binding counting_sort_binding([](py::module_& module) {
  module.def("counting_sort", counting_sort);
  module.attr("most_segments") = minirl::kMostSegments;
});

}  // namespace
#endif
