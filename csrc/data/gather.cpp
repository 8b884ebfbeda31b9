// gather(): pieces of tokens out of a memory map, widened to int64, without the GIL while pages come from the disk.
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "module.h"

namespace py = pybind11;

namespace {

// No forcecast: an argument of another dtype or layout is refused, never silently copied.
using Int64s = py::array_t<std::int64_t, py::array::c_style>;

struct Piece {
  std::int64_t start, length, place;
};

void check_range(const char* what, std::int64_t first, std::int64_t length, std::int64_t size) {
  if (length < 0 || first < 0 || first > size - length) {
    throw py::index_error(std::string(what) + " [" + std::to_string(first) + ", " + std::to_string(first) + " + " +
                          std::to_string(length) + ") are outside the " + std::to_string(size) + " there are");
  }
}

// False where a float's value does not fit an int64 (NaN included); converting it would be undefined.
template <typename T>
bool copy_piece(const T* from, std::int64_t* to, std::int64_t length) {
  if constexpr (std::is_floating_point_v<T>) {
    constexpr T limit = static_cast<T>(9223372036854775808.0);  // 2^63
    for (std::int64_t i = 0; i < length; ++i) {
      if (!(from[i] > -limit && from[i] < limit)) return false;
    }
  }
  for (std::int64_t i = 0; i < length; ++i) to[i] = static_cast<std::int64_t>(from[i]);
  return true;
}

template <typename T>
bool gather_as(const py::array& tokens, const std::vector<Piece>& pieces, Int64s& out) {
  if (!py::isinstance<py::array_t<T>>(tokens)) return false;
  const auto* from = static_cast<const T*>(tokens.data());
  if (reinterpret_cast<std::uintptr_t>(from) % alignof(T)) throw py::value_error("tokens are not aligned");
  std::int64_t* to = out.mutable_data();  // throws where out is read-only
  py::gil_scoped_release unlocked;
  for (const Piece& piece : pieces) {
    if (!copy_piece(from + piece.start, to + piece.place, piece.length)) {
      throw py::value_error("tokens from " + std::to_string(piece.start) + " on hold a float that is no int64");
    }
  }
  return true;
}

void gather(const py::array& tokens, const Int64s& starts, const Int64s& lengths, const Int64s& places, Int64s out) {
  megalite::check_aligned(tokens, starts, lengths, places, out);
  if (tokens.ndim() != 1 || !(tokens.flags() & py::array::c_style)) {
    throw py::value_error("tokens must be a contiguous array of one dimension");
  }
  if (starts.ndim() != 1 || lengths.ndim() != 1 || places.ndim() != 1 || lengths.size() != starts.size() ||
      places.size() != starts.size()) {
    throw py::value_error("starts, lengths and places must have one shape [P]");
  }
  // Checked and kept before anything is copied: another thread may write to these arrays once the GIL is released.
  std::vector<Piece> pieces(starts.size());
  for (py::ssize_t i = 0; i < starts.size(); ++i) {
    pieces[i] = {starts.data()[i], lengths.data()[i], places.data()[i]};
    check_range("tokens", pieces[i].start, pieces[i].length, tokens.size());
    check_range("places", pieces[i].place, pieces[i].length, out.size());
  }
  const bool known = gather_as<std::uint16_t>(tokens, pieces, out) || gather_as<std::int32_t>(tokens, pieces, out) ||
                     gather_as<std::uint8_t>(tokens, pieces, out) || gather_as<std::int8_t>(tokens, pieces, out) ||
                     gather_as<std::int16_t>(tokens, pieces, out) || gather_as<std::int64_t>(tokens, pieces, out) ||
                     gather_as<float>(tokens, pieces, out) || gather_as<double>(tokens, pieces, out);
  if (!known) throw py::type_error("tokens have a dtype that no Megatron file has");
}

}  // namespace

void megalite::define_gather(py::module_& module) {
  module.def("gather", &gather, py::arg("tokens"), py::arg("starts").noconvert(), py::arg("lengths").noconvert(),
             py::arg("places").noconvert(), py::arg("out").noconvert(),
             "out.flat[places[i] : places[i] + lengths[i]] = tokens[starts[i] : starts[i] + lengths[i]], in order.\n\n"
             "tokens: [N] of any dtype Megatron writes; starts, lengths, places: [P] int64; out: int64 of any shape.\n"
             "Raises IndexError, before anything is written, where a piece reaches outside the tokens or out, and\n"
             "ValueError where a float is no int64.");
}
