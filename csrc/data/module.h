// What each file of this folder adds to the Python module `megalite._data`.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace megalite {

// Raises ValueError for arrays whose numbers do not lie at multiples of their size, as those of a file may.
template <class... Arrays>
void check_aligned(const Arrays&... arrays) {
  if (!((arrays.flags() & pybind11::detail::npy_api::NPY_ARRAY_ALIGNED_) && ...)) {
    throw pybind11::value_error("an array is not aligned");
  }
}

void define_gather(pybind11::module_& module);
void define_blend(pybind11::module_& module);
void define_packing(pybind11::module_& module);
void define_permute(pybind11::module_& module);
void define_starts(pybind11::module_& module);
void define_texts(pybind11::module_& module);

}  // namespace megalite
