#include "module.h"

PYBIND11_MODULE(_data, module) {
  module.doc() = "Native helpers of megalite.data; the references are beside their callers in Python.";
  megalite::define_gather(module);
  megalite::define_blend(module);
  megalite::define_packing(module);
  megalite::define_permute(module);
  megalite::define_starts(module);
  megalite::define_texts(module);
}
