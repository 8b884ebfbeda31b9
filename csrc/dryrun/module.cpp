// The Python module `megalite._dryrun`: importing it makes torch's CPU build take tensors on CUDA devices.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "memory.h"

namespace py = pybind11;

namespace megalite::dryrun {

void register_attention();
void register_allocator();

namespace {

// Never destroyed: Python may be gone by then.
py::function* place_of = nullptr;

int64_t ask_python(const char* kind) {
  py::gil_scoped_acquire gil;
  return (*place_of)(kind).cast<int64_t>();
}

}  // namespace

}  // namespace megalite::dryrun

PYBIND11_MODULE(_dryrun, m) {
  using namespace megalite::dryrun;
  register_allocator();
  register_attention();
  m.def("start", [](py::function function) {
    place_of = new py::function(std::move(function));
    set_where(&ask_python);
  }, "Ask `function(kind)` for the number of the place in the program, at each allocation and each wait of the host.");
  m.def("allocated", [] { return usage().now; }, "Bytes allocated now.");
  m.def("peak", [] { return usage().peak; }, "Most bytes allocated since `reset_peak`.");
  m.def("pinned_peak", [] { return usage().pinned_peak; }, "Most bytes of pinned host memory so far.");
  m.def("reset_peak", &reset_peak, "Begin a new phase.");
  m.def("peak_place", &peak_place, "Number of the place whose allocation made the peak of the phase.");
  m.def("at_peak", &at_peak, "Bytes at the peak of the phase, by the number of the place that allocated them.");
}
