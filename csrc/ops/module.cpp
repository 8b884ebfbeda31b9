// The Python module `megalite._ops`: importing it registers the operators. It tells what was built and what runs.
#include <Python.h>

#include "cpu/isa.h"

#if defined(MEGALITE_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace megalite {

namespace {

// Whether AMX multiplies bf16 here: Linux lets a process use tiles when it has asked for their 8 KiB a thread.
bool allows_amx() {
#if defined(MEGALITE_X86) && defined(__linux__)
  constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & AMX_BF16) && (d & AMX_TILE) &&
         syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
#else
  return false;
#endif
}

int best_isa() {
#ifdef MEGALITE_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16")) return allows_amx() ? amx : avx512;
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
  static const char* const names[] = {"base", "avx2", "avx512", "amx"};
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
    {"set_isa", set_isa, METH_O, "Use at most this one (0 base, 1 avx2, 2 avx512, 3 amx): for tests."},
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
