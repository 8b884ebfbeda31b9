// Element types of kernels. No torch in here: kernels are compiled per instruction set, and an inline function of torch's
// compiled for one of them could be linked into code for all.
#pragma once

#include <cstdint>

namespace megalite {

enum class Type { f32, bf16 };

}  // namespace megalite
