// Which of the compiled versions of a CPU kernel runs here.
#pragma once

#include <cstdint>

namespace megalite {

// amx: the kernels of avx512, and tiles where a kernel has use for them.
enum Isa : int { base = 0, avx2 = 1, avx512 = 2, amx = 3 };

// The best that this machine has, unless set_isa (tests) chose a lesser one.
int isa();
void set_isa(int chosen);

}  // namespace megalite

// Declares a kernel in the namespace of each instruction set, and `cpu::name(...)`, which calls the right one.
#ifdef MEGALITE_X86
#define MEGALITE_CPU_KERNEL(name, parameters, arguments) \
  namespace megalite::cpu::base { void name parameters; } \
  namespace megalite::cpu::avx2 { void name parameters; } \
  namespace megalite::cpu::avx512 { void name parameters; } \
  namespace megalite::cpu { \
  inline void name parameters { \
    switch (isa()) { \
      case 3: case 2: return avx512::name arguments; \
      case 1: return avx2::name arguments; \
      default: return base::name arguments; \
    } \
  } \
  }
#else
#define MEGALITE_CPU_KERNEL(name, parameters, arguments) \
  namespace megalite::cpu::base { void name parameters; } \
  namespace megalite::cpu { inline void name parameters { base::name arguments; } }
#endif
