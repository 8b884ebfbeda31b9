// What each file of this folder adds to the Python module `megalite._data`.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace megalite {

void define_gather(pybind11::module_& module);
void define_blend(pybind11::module_& module);
void define_packing(pybind11::module_& module);
void define_permute(pybind11::module_& module);
void define_starts(pybind11::module_& module);
void define_texts(pybind11::module_& module);

}  // namespace megalite
