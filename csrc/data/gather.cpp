// gather(): rows of tokens out of a memory map, widened to int64, without the GIL while pages come from the disk.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

namespace py = pybind11;

namespace {

// No forcecast: an argument of another dtype or layout is refused, never silently copied.
using Int64s = py::array_t<std::int64_t, py::array::c_style>;

// False where a float's value does not fit an int64 (NaN included); converting it would be undefined.
template <typename T>
bool copy_row(const T* from, std::int64_t* to, py::ssize_t length) {
  if constexpr (std::is_floating_point_v<T>) {
    constexpr T limit = static_cast<T>(9223372036854775808.0);  // 2^63
    for (py::ssize_t i = 0; i < length; ++i) {
      if (!(from[i] > -limit && from[i] < limit)) return false;
    }
  }
  for (py::ssize_t i = 0; i < length; ++i) to[i] = static_cast<std::int64_t>(from[i]);
  return true;
}

template <typename T>
bool gather_as(const py::array& tokens, const std::vector<std::int64_t>& starts, py::ssize_t length, Int64s& out) {
  if (!py::isinstance<py::array_t<T>>(tokens)) return false;
  const auto* from = static_cast<const T*>(tokens.data());
  if (reinterpret_cast<std::uintptr_t>(from) % alignof(T)) throw py::value_error("tokens are not aligned");
  std::int64_t* to = out.mutable_data();  // throws where out is read-only
  py::gil_scoped_release unlocked;
  for (const std::int64_t start : starts) {
    if (!copy_row(from + start, to, length)) {
      throw py::value_error("tokens from " + std::to_string(start) + " on hold a float that is no int64");
    }
    to += length;
  }
  return true;
}

void gather(const py::array& tokens, const Int64s& starts, py::ssize_t length, Int64s out) {
  if (tokens.ndim() != 1 || !(tokens.flags() & py::array::c_style)) {
    throw py::value_error("tokens must be a contiguous array of one dimension");
  }
  if (starts.ndim() != 1 || out.ndim() != 2 || out.shape(0) != starts.shape(0) || out.shape(1) != length) {
    throw py::value_error("for starts of shape [n], out must have shape [n, length]");
  }
  // Checked and kept before anything is copied: another thread may write to `starts` once the GIL is released.
  const std::vector<std::int64_t> checked(starts.data(), starts.data() + starts.size());
  const std::int64_t size = tokens.shape(0);
  for (const std::int64_t start : checked) {
    if (start < 0 || start > size - length) {
      throw py::index_error("tokens [" + std::to_string(start) + ", " + std::to_string(start) + " + " +
                            std::to_string(length) + ") are outside the " + std::to_string(size) + " there are");
    }
  }
  const bool known = gather_as<std::uint16_t>(tokens, checked, length, out) ||
                     gather_as<std::int32_t>(tokens, checked, length, out) ||
                     gather_as<std::uint8_t>(tokens, checked, length, out) ||
                     gather_as<std::int8_t>(tokens, checked, length, out) ||
                     gather_as<std::int16_t>(tokens, checked, length, out) ||
                     gather_as<std::int64_t>(tokens, checked, length, out) ||
                     gather_as<float>(tokens, checked, length, out) || gather_as<double>(tokens, checked, length, out);
  if (!known) throw py::type_error("tokens have a dtype that no Megatron file has");
}

}  // namespace

PYBIND11_MODULE(_data, module) {
  module.doc() = "Native helpers of megalite.data; the references are beside their callers in Python.";
  module.def("gather", &gather, py::arg("tokens"), py::arg("starts").noconvert(), py::arg("length"),
             py::arg("out").noconvert(),
             "out[i, :] = tokens[starts[i] : starts[i] + length].\n\n"
             "tokens: [N] of any dtype Megatron writes; starts: [n] int64; out: [n, length] int64. Raises IndexError\n"
             "where a row reaches outside the tokens and ValueError where a float is no int64.");
}
