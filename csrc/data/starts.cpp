// document_starts(): where documents begin, read out of a memory-mapped .idx in which nothing is aligned.
#include <cstdint>
#include <cstring>
#include <vector>

#include "module.h"

namespace py = pybind11;

namespace {

using Int64s = py::array_t<std::int64_t, py::array::c_style>;

// An array of int64 at any address.
class Unaligned {
 public:
  Unaligned(const py::array& array, const char* name) : bytes_(static_cast<const char*>(array.data())) {
    if (array.ndim() != 1 || !py::isinstance<py::array_t<std::int64_t>>(array) || array.strides(0) != 8) {
      throw py::value_error(std::string(name) + " must be int64 in a row");
    }
    size = array.size();
  }
  std::int64_t operator[](std::int64_t i) const {
    std::int64_t value;
    std::memcpy(&value, bytes_ + 8 * i, 8);
    return value;
  }
  std::int64_t size;

 private:
  const char* bytes_;
};

py::tuple document_starts(const py::array& documents, const py::array& pointers, std::int64_t itemsize,
                          const Int64s& first, const Int64s& last) {
  megalite::check_aligned(first, last);
  const Unaligned sequence(documents, "documents"), pointer(pointers, "pointers");
  if (first.ndim() != 1 || last.ndim() != 1 || first.size() != last.size() || itemsize < 1 || sequence.size < 1) {
    throw py::value_error("first and last must have one shape [n], and documents and itemsize be at least 1");
  }
  const py::ssize_t rows = first.size();
  Int64s counts(rows);
  std::int64_t* const count = counts.mutable_data();
  const std::int64_t *const from = first.data(), *const to = last.data();
  const std::int64_t num_documents = sequence.size - 1;
  std::vector<std::int64_t> found;
  bool inside = true;
  {
    py::gil_scoped_release unlocked;
    const auto start_of = [&](std::int64_t document) {
      const std::int64_t number = sequence[document];
      inside = inside && number >= 0 && number <= pointer.size;
      // A document without a sequence at the end of the file begins behind all others.
      return inside && number < pointer.size ? pointer[number] / itemsize : INT64_MAX;
    };
    for (py::ssize_t row = 0; row < rows; ++row) {
      std::int64_t low = 0, high = num_documents;  // the first document at or behind `from`
      while (low < high) {
        const std::int64_t middle = low + (high - low) / 2;
        if (start_of(middle) < from[row]) low = middle + 1;
        else high = middle;
      }
      const std::size_t before = found.size();
      for (; low < num_documents; ++low) {
        const std::int64_t start = start_of(low);
        if (start >= to[row]) break;
        found.push_back(start);
      }
      count[row] = static_cast<std::int64_t>(found.size() - before);
    }
  }
  if (!inside) throw py::index_error("a document begins at a sequence that is not there");
  return py::make_tuple(counts, Int64s(static_cast<py::ssize_t>(found.size()), found.data()));
}

}  // namespace

void megalite::define_starts(py::module_& module) {
  module.def("document_starts", &document_starts, py::arg("documents"), py::arg("pointers"), py::arg("itemsize"),
             py::arg("first").noconvert(), py::arg("last").noconvert(),
             "Tokens, ascending, at which documents begin within [first[i], last[i]) for each i.\n\n"
             "documents: [D] int64, first sequence of each document, then N; pointers: [N] int64, byte of each\n"
             "sequence; neither need be aligned. Returns how many each row has, [n], and all of them, int64.");
}
