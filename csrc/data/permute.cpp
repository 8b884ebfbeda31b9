// permute_in_place(): a bijection of [0, size), one index at a time; see megalite/data/order.py.
#include <cstdint>

#include "module.h"

namespace py = pybind11;

namespace {

using Words = py::array_t<std::uint64_t, py::array::c_style>;

constexpr int kRounds = 12;

std::uint64_t splitmix64(std::uint64_t key, std::uint64_t position) {
  std::uint64_t state = key + position * 0x9E3779B97F4A7C15;
  state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9;
  state = (state ^ (state >> 27)) * 0x94D049BB133111EB;
  return state ^ (state >> 31);
}

std::uint64_t feistel(std::uint64_t value, std::uint64_t key, int half_bits) {
  std::uint64_t left = value >> half_bits, right = value & ((std::uint64_t{1} << half_bits) - 1);
  for (std::uint64_t round = 0; round < kRounds; ++round) {
    const std::uint64_t noise = splitmix64(key, right + (round << half_bits) + 1) >> (64 - half_bits);
    const std::uint64_t next = left ^ noise;
    left = right;
    right = next;
  }
  return left << half_bits | right;
}

void permute_in_place(Words values, const Words& keys, std::uint64_t size, int half_bits) {
  megalite::check_aligned(values, keys);
  if (values.ndim() != 1 || keys.ndim() != 1 || values.size() != keys.size()) {
    throw py::value_error("values and keys must have one shape [n]");
  }
  // A domain much larger than `size` would be walked for ever.
  if (half_bits < 1 || half_bits > 31 || size < 1 || size > std::uint64_t{1} << 2 * half_bits ||
      (half_bits > 1 && size <= std::uint64_t{1} << 2 * (half_bits - 1))) {
    throw py::value_error("half_bits must be 1 … 31, and the least of which size is at most 4^half_bits");
  }
  std::uint64_t* const value = values.mutable_data();  // throws where values is read-only
  const std::uint64_t* const key = keys.data();
  const py::ssize_t count = values.size();
  for (py::ssize_t i = 0; i < count; ++i) {
    if (value[i] >= size) throw py::value_error("a value is not below size");
  }
  py::gil_scoped_release unlocked;
  for (py::ssize_t i = 0; i < count; ++i) {
    const std::uint64_t own = key[i];  // also where `keys` is `values`
    std::uint64_t walked = value[i];
    do walked = feistel(walked, own, half_bits);
    while (walked >= size);
    value[i] = walked;
  }
}

}  // namespace

void megalite::define_permute(py::module_& module) {
  module.def("permute_in_place", &permute_in_place, py::arg("values").noconvert(), py::arg("keys").noconvert(),
             py::arg("size"), py::arg("half_bits"),
             "Where the bijection of [0, size) that each key chooses sends each value.\n\n"
             "values, keys: [n] uint64; half_bits: half the bits of the domain that is walked,\n"
             "the least that hold `size`.");
}
