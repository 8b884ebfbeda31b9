// The Python module `megalite._ops`: importing it registers the operators. It tells what was built and what runs.
#include <Python.h>

#include "cpu/isa.h"

namespace megalite {

namespace {

int best_isa() {
#ifdef MEGALITE_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16")) return avx512;
  if (__builtin_cpu_supports("x86-64-v3")) return avx2;
#endif
  return base;
}

int chosen_isa = best_isa();

}  // namespace

int isa() { return chosen_isa; }
void set_isa(int chosen) { chosen_isa = chosen < best_isa() ? chosen : best_isa(); }

}  // namespace megalite

namespace {

PyObject* isa(PyObject*, PyObject*) {
#ifdef __aarch64__
  static const char* const names[] = {"neon"};
#else
  static const char* const names[] = {"base", "avx2", "avx512"};
#endif
  return PyUnicode_FromString(names[megalite::isa()]);
}

PyObject* set_isa(PyObject*, PyObject* argument) {
  const long chosen = PyLong_AsLong(argument);
  if (PyErr_Occurred()) return nullptr;
  megalite::set_isa(static_cast<int>(chosen));
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS, "Name of the instruction set that CPU kernels run with."},
    {"set_isa", set_isa, METH_O, "Use at most this one (0 base, 1 avx2, 2 avx512): for tests."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_ops", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__ops() {
  PyObject* module = PyModule_Create(&definition);
#ifdef MEGALITE_CUDA
  PyModule_AddIntConstant(module, "has_cuda", 1);
#else
  PyModule_AddIntConstant(module, "has_cuda", 0);
#endif
  return module;
}
