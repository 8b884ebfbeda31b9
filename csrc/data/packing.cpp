// pack(): documents into bins of equal capacity, best fit decreasing.
#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "module.h"

namespace py = pybind11;

namespace {

using Int32s = py::array_t<std::int32_t, py::array::c_style>;

constexpr std::int64_t stride = 2654435761;  // a prime above 2^31, so that strides meet every document

// A set of the numbers 0 … size - 1: a bit each, and above them a bit for each word that is not empty, and so on up.
class NumberSet {
 public:
  explicit NumberSet(std::int64_t size) {
    do {
      size = (size + 63) / 64;
      levels_.emplace_back(size, 0);
    } while (size > 1);
  }

  void insert(std::int64_t number) {
    for (auto& level : levels_) {
      level[number / 64] |= bit(number);
      number /= 64;
    }
  }

  void erase(std::int64_t number) {
    for (auto& level : levels_) {
      if (level[number / 64] &= ~bit(number)) return;
      number /= 64;
    }
  }

  // The least member that is at least `number`; -1 where there is none.
  std::int64_t at_least(std::int64_t number) const {
    for (std::size_t up = 0; up < levels_.size(); ++up) {
      const auto& level = levels_[up];
      if (number / 64 >= static_cast<std::int64_t>(level.size())) return -1;
      if (const std::uint64_t word = level[number / 64] & (~std::uint64_t{0} << number % 64)) {
        number = number / 64 * 64 + __builtin_ctzll(word);
        while (up > 0) number = number * 64 + __builtin_ctzll(levels_[--up][number]);
        return number;
      }
      number = number / 64 + 1;
    }
    return -1;
  }

 private:
  static std::uint64_t bit(std::int64_t number) { return std::uint64_t{1} << number % 64; }

  std::vector<std::vector<std::uint64_t>> levels_;
};

// The bins that have room, found by how much they have. Of equals, the one that came to it last.
class OpenBins {
 public:
  explicit OpenBins(std::int32_t capacity) : spaces_(capacity), top_(capacity, -1) {}

  // A new bin comes here with less than its whole capacity, and with some of it.
  void put(std::int32_t bin, std::int32_t space) {
    if (space == 0) return;
    if (top_[space] < 0) spaces_.insert(space);
    if (static_cast<std::size_t>(bin) == below_.size()) below_.push_back(-1);
    below_[bin] = std::exchange(top_[space], bin);
  }

  // Takes the bin with the least space that is enough: {bin, space}, or {-1, …}.
  std::pair<std::int32_t, std::int32_t> take(std::int32_t length) {
    const auto space = static_cast<std::int32_t>(spaces_.at_least(length));
    if (space < 0) return {-1, 0};
    const std::int32_t bin = std::exchange(top_[space], below_[top_[space]]);
    if (top_[space] < 0) spaces_.erase(space);
    return {bin, space};
  }

 private:
  NumberSet spaces_;
  std::vector<std::int32_t> top_, below_;  // a stack for each space, linked through the bins
};

class Packer {
 public:
  Packer(const std::vector<std::int32_t>& lengths, std::int32_t capacity)
      : lengths_(lengths), num_documents_(static_cast<std::int32_t>(lengths.size())), capacity_(capacity) {}

  // Puts what a document has beyond its full pieces into a bin, longest first.
  void place() {
    bin_of_.assign(num_documents_, -1);
    OpenBins open(capacity_);
    for (const std::int32_t document : by_remainder()) {
      const std::int32_t remainder = lengths_[document] % capacity_;
      auto [bin, space] = open.take(remainder);
      if (bin < 0) {
        bin = static_cast<std::int32_t>(opener_.size());
        space = capacity_;
        opener_.push_back(document);
      }
      bin_of_[document] = bin;
      open.put(bin, space - remainder);
    }
  }

  // Numbers the bins in the order of the pieces that opened them, which is the corpus' own. Returns how many.
  std::int64_t number_bins() {
    number_.resize(opener_.size());
    std::int64_t next = 0;
    for (std::int32_t document = 0; document < num_documents_; ++document) {
      next += lengths_[document] / capacity_;
      if (opens_bin(document)) number_[bin_of_[document]] = next++;
    }
    return next;
  }

  // Calls visit(bin, document, offset, length) for every piece, in the order of the corpus.
  template <typename Visit>
  void for_each_piece(Visit visit) const {
    std::int64_t next = 0;
    for (std::int32_t document = 0; document < num_documents_; ++document) {
      std::int32_t offset = 0;
      for (; lengths_[document] - offset >= capacity_; offset += capacity_) visit(next++, document, offset, capacity_);
      if (bin_of_[document] < 0) continue;
      visit(number_[bin_of_[document]], document, offset, lengths_[document] - offset);
      if (opens_bin(document)) ++next;
    }
  }

 private:
  bool opens_bin(std::int32_t document) const {
    return bin_of_[document] >= 0 && opener_[bin_of_[document]] == document;
  }

  // Documents that have a remainder, by counting sort; equals as they come in strides through the corpus.
  std::vector<std::int32_t> by_remainder() const {
    std::vector<std::int32_t> first(capacity_, 0);  // of each remainder; longer ones come before
    for (std::int32_t document = 0; document < num_documents_; ++document) ++first[lengths_[document] % capacity_];
    std::int32_t total = 0;
    for (std::int32_t remainder = capacity_ - 1; remainder > 0; --remainder) {
      total += std::exchange(first[remainder], total);
    }
    std::vector<std::int32_t> sorted(total);
    std::int64_t document = 0;
    for (std::int32_t i = 0; i < num_documents_; ++i, document = (document + stride) % num_documents_) {
      if (const std::int32_t remainder = lengths_[document] % capacity_) {
        sorted[first[remainder]++] = static_cast<std::int32_t>(document);
      }
    }
    return sorted;
  }

  const std::vector<std::int32_t>& lengths_;
  const std::int32_t num_documents_, capacity_;
  std::vector<std::int32_t> bin_of_;  // of each document's remainder, in the order of opening; -1: it has none
  std::vector<std::int32_t> opener_;  // document whose remainder opened each of those bins
  std::vector<std::int64_t> number_;  // of each of those bins among all
};

py::tuple pack(const Int32s& lengths, std::int32_t capacity) {
  megalite::check_aligned(lengths);
  if (lengths.ndim() != 1 || lengths.size() > INT32_MAX || capacity < 1) {
    throw py::value_error("lengths must have one dimension of less than 2^31, and capacity must be at least 1");
  }
  // A copy: another thread may write to `lengths` once the GIL is released.
  const std::vector<std::int32_t> checked(lengths.data(), lengths.data() + lengths.size());
  std::int64_t num_pieces = 0, total = 0;  // neither exceeds 2^31 documents of 2^31 tokens
  for (const std::int32_t tokens : checked) {
    if (tokens < 0) throw py::value_error("a document has a negative length");
    num_pieces += (std::int64_t{tokens} + capacity - 1) / capacity;
    total += tokens;
  }
  // What is as long as all of them and one more holds all, as a longer one does that would take more memory.
  capacity = static_cast<std::int32_t>(std::min<std::int64_t>(capacity, total + 1));
  Int32s document(num_pieces), offset(num_pieces), length(num_pieces);
  std::int32_t *const documents = document.mutable_data(), *const offsets = offset.mutable_data();
  std::int32_t* const piece_lengths = length.mutable_data();
  Packer packer(checked, capacity);
  std::int64_t num_bins;
  {
    py::gil_scoped_release unlocked;
    packer.place();
    num_bins = packer.number_bins();
  }
  py::array_t<std::int64_t> first_piece(num_bins + 1);
  std::int64_t* const firsts = first_piece.mutable_data();
  {
    py::gil_scoped_release unlocked;
    std::fill(firsts, firsts + num_bins + 1, 0);
    packer.for_each_piece([&](std::int64_t bin, auto...) { ++firsts[bin]; });
    std::int64_t total = 0;
    for (std::int64_t bin = 0; bin <= num_bins; ++bin) total += std::exchange(firsts[bin], total);
    packer.for_each_piece([&](std::int64_t bin, std::int32_t from, std::int32_t at, std::int32_t tokens) {
      const std::int64_t piece = firsts[bin]++;
      documents[piece] = from, offsets[piece] = at, piece_lengths[piece] = tokens;
    });
    // Each is now where the next bin starts.
    for (std::int64_t bin = num_bins; bin > 0; --bin) firsts[bin] = firsts[bin - 1];
    firsts[0] = 0;
  }
  return py::make_tuple(first_piece, document, offset, length);
}

}  // namespace

void megalite::define_packing(py::module_& module) {
  module.def("pack", &pack, py::arg("lengths").noconvert(), py::arg("capacity"),
             "Arrays first_piece [bins + 1] int64 and document, offset, length [pieces] int32 of a Packing.\n\n"
             "lengths: [D] int32. Raises ValueError for a negative one.");
}
