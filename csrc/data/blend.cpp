// blend_greedily(): Megatron's order of the samples of several sources.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "module.h"

namespace py = pybind11;

namespace {

using Doubles = py::array_t<double, py::array::c_style>;

py::tuple blend_greedily(const Doubles& weights, std::int64_t size) {
  megalite::check_aligned(weights);
  if (weights.ndim() != 1 || weights.size() < 1 || weights.size() > INT16_MAX || size < 0) {
    throw py::value_error("weights must have shape [1 … 32767], and size must not be negative");
  }
  const std::vector<double> weight(weights.data(), weights.data() + weights.size());
  std::vector<double> taken(weight.size(), 0.0);
  py::array_t<std::int16_t> source(size);
  py::array_t<std::int64_t> sample(size);
  std::int16_t* const sources = source.mutable_data();
  std::int64_t* const samples = sample.mutable_data();
  {
    py::gil_scoped_release unlocked;
    for (std::int64_t i = 0; i < size; ++i) {
      const double so_far = static_cast<double>(std::max<std::int64_t>(i, 1));
      std::size_t most = 0;
      double behind = weight[0] * so_far - taken[0];
      for (std::size_t d = 1; d < weight.size(); ++d) {
        // Product and difference are rounded each (the build has no fused multiply-add), or ties would fall otherwise.
        const double error = weight[d] * so_far - taken[d];
        if (error > behind) behind = error, most = d;
      }
      sources[i] = static_cast<std::int16_t>(most);
      samples[i] = static_cast<std::int64_t>(taken[most]);
      taken[most] += 1.0;
    }
  }
  return py::make_tuple(source, sample);
}

}  // namespace

void megalite::define_blend(py::module_& module) {
  module.def("blend_greedily", &blend_greedily, py::arg("weights").noconvert(), py::arg("size"),
             "Sample by sample, the source that is furthest behind its weight; of equals, the first.\n\n"
             "weights: [D] float64 that sum to 1. Returns the source, [size] int16, and which of its samples,\n"
             "[size] int64.");
}
