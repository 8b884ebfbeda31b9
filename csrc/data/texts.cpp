// What reading text for a tokenizer costs around the tokenizer itself: JSON lines, unknown characters, ends of
// documents. All of it without Python's lock, so that threads do not wait for each other.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <string_view>
#include <vector>

#include "module.h"

namespace py = pybind11;

namespace {

constexpr std::uint64_t ones = 0x0101010101010101, high_bits = 0x8080808080808080;

// The high bit of every byte that is 0; above the lowest such byte others may be marked too.
std::uint64_t zeros(std::uint64_t word) { return (word - ones) & ~word & high_bits; }

std::uint64_t load(const char* at) {
  std::uint64_t word;
  std::memcpy(&word, at, 8);
  return word;
}

// The code point that begins at `at`, which is moved behind it; -1 where the bytes are not UTF-8.
std::int32_t code_point(const char*& at, const char* end) {
  const auto byte = [&](int i) { return static_cast<unsigned char>(at[i]); };
  const int lead = byte(0);
  const int size = lead < 0x80 ? 1 : lead < 0xC2 ? 0 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : lead < 0xF5 ? 4 : 0;
  if (size == 0 || end - at < size) return -1;
  std::int32_t point = size == 1 ? lead : lead & (0x7F >> size);
  for (int i = 1; i < size; ++i) {
    if ((byte(i) & 0xC0) != 0x80) return -1;
    point = point << 6 | (byte(i) & 0x3F);
  }
  if ((size == 3 && (point < 0x800 || (point >> 11) == 0x1B)) || (size == 4 && (point < 0x10000 || point > 0x10FFFF))) {
    return -1;
  }
  at += size;
  return point;
}

char* write(std::uint32_t point, char* to) {
  if (point < 0x80) {
    *to++ = static_cast<char>(point);
    return to;
  }
  const int size = point < 0x800 ? 2 : point < 0x10000 ? 3 : 4;
  *to++ = static_cast<char>((0xF00 >> size & 0xFF) | point >> 6 * (size - 1));
  for (int i = size - 2; i >= 0; --i) *to++ = static_cast<char>(0x80 | (point >> 6 * i & 0x3F));
  return to;
}

// Reads one line of strict JSON. Every function returns false where the line is anything but plainly right.
class Line {
 public:
  Line(const char* at, const char* end, char* to) : to(to), at_(at), end_(end) {}

  // The string under `key` in an object, written to [text, to); of two such keys, the last.
  bool text_of(std::string_view key) {
    space();
    if (!take('{')) return false;
    char* const start = text = to;
    bool found = false;
    space();
    while (true) {
      to = text_end_;
      char* const name = to;
      if (!string()) return false;
      const bool here = std::string_view(name, to - name) == key;
      to = name;
      space();
      if (!take(':')) return false;
      space();
      if (here) {
        if (at_ == end_ || *at_ != '"' || !string()) return false;
        std::memmove(start, name, to - name);
        text_end_ = start + (to - name);
        found = true;
      } else if (!value(0)) {
        return false;
      }
      space();
      if (take('}')) break;
      if (!take(',')) return false;
      space();
    }
    space();
    to = text_end_;
    return found && at_ == end_;
  }

  char* text;
  char* to;

 private:
  static constexpr int deepest = 64, longest_number = 64;

  bool take(char wanted) {
    if (at_ == end_ || *at_ != wanted) return false;
    ++at_;
    return true;
  }

  void space() {
    while (at_ < end_ && (*at_ == ' ' || *at_ == '\t' || *at_ == '\r')) ++at_;
  }

  bool literal(std::string_view word) {
    if (std::string_view(at_, end_ - at_).substr(0, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }

  bool digits() {
    const char* const first = at_;
    while (at_ < end_ && *at_ >= '0' && *at_ <= '9') ++at_;
    return at_ > first;
  }

  bool number() {
    const char* const first = at_;
    take('-');
    if (!take('0') && !digits()) return false;
    if (take('.') && !digits()) return false;
    if (take('e') || take('E')) {
      if (!take('+')) take('-');
      if (!digits()) return false;
    }
    return at_ - first <= longest_number;
  }

  // Nothing of it is kept.
  bool value(int depth) {
    if (at_ == end_ || depth > deepest) return false;
    char* const start = to;
    switch (*at_) {
      case '"': {
        const bool good = string();
        to = start;
        return good;
      }
      case 't': return literal("true");
      case 'f': return literal("false");
      case 'n': return literal("null");
      case '{':
      case '[': {
        const bool object = *at_++ == '{';
        const char last = object ? '}' : ']';
        space();
        if (take(last)) return true;
        while (true) {
          if (object) {
            if (!string()) return false;
            to = start;
            space();
            if (!take(':')) return false;
            space();
          }
          if (!value(depth + 1)) return false;
          space();
          if (take(last)) return true;
          if (!take(',')) return false;
          space();
        }
      }
      default: return number();
    }
  }

  // Written to `to` without its escapes: never more bytes than it has here.
  bool string() {
    if (!take('"')) return false;
    while (true) {
      while (end_ - at_ >= 8) {
        const std::uint64_t word = load(at_);
        const std::uint64_t control = (word - ones * 0x20) & ~word & high_bits;
        if (control | zeros(word ^ ones * '"') | zeros(word ^ ones * '\\') | (word & high_bits)) break;
        std::memcpy(to, &word, 8);
        at_ += 8, to += 8;
      }
      // Up to and with the next byte that is special; only then is a whole word tried again.
      while (true) {
        if (at_ == end_) return false;
        const unsigned char byte = *at_;
        if (byte == '"') {
          ++at_;
          return true;
        }
        if (byte == '\\') {
          if (!escape()) return false;
          break;
        }
        if (byte < 0x20) return false;
        if (byte >= 0x80) {
          const char* const first = at_;
          if (code_point(at_, end_) < 0) return false;
          for (const char* from = first; from < at_; ++from) *to++ = *from;
          continue;  // others of its kind are likely to follow
        }
        *to++ = byte, ++at_;
      }
    }
  }

  bool escape() {
    if (end_ - at_ < 2) return false;
    const char kind = at_[1];
    at_ += 2;
    switch (kind) {
      case '"': case '\\': case '/': *to++ = kind; return true;
      case 'n': *to++ = '\n'; return true;
      case 't': *to++ = '\t'; return true;
      case 'r': *to++ = '\r'; return true;
      case 'b': *to++ = '\b'; return true;
      case 'f': *to++ = '\f'; return true;
      case 'u': break;
      default: return false;
    }
    std::uint32_t point, low;
    if (!hexadecimal(point)) return false;
    if (point >> 11 == 0x1B) {  // half of a pair
      if (point >= 0xDC00 || !take('\\') || !take('u') || !hexadecimal(low) || low >> 10 != 0x37) return false;
      point = 0x10000 + ((point & 0x3FF) << 10 | (low & 0x3FF));
    }
    to = write(point, to);
    return true;
  }

  bool hexadecimal(std::uint32_t& number) {
    if (end_ - at_ < 4) return false;
    number = 0;
    for (int i = 0; i < 4; ++i) {
      const char c = *at_++;
      const int digit = c >= '0' && c <= '9'   ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                               : -1;
      if (digit < 0) return false;
      number = number << 4 | digit;
    }
    return true;
  }

  const char* at_;
  const char* const end_;
  char* text_end_ = to;
};

py::tuple json_texts(const py::bytes& lines, const std::string& key, std::size_t longest) {
  struct Found {
    const char *first, *last;  // of the text, or of an odd line
    bool odd;
  };
  const std::string_view data = lines;
  std::unique_ptr<char[]> room(new char[data.size() + 8]);  // not filled with zeros
  std::vector<Found> found;
  {
    py::gil_scoped_release unlocked;
    const char* const end = data.data() + data.size();
    char* to = room.get();
    for (const char* at = data.data(); at < end;) {
      const auto* const stop = static_cast<const char*>(std::memchr(at, '\n', end - at));
      const char* const last = stop ? stop : end;
      Line line(at, last, to);
      const bool good = static_cast<std::size_t>(last - at) <= longest && line.text_of(key) && line.to > line.text;
      if (good) {
        found.push_back({to, line.to, false});
        to = line.to;
      } else {
        found.push_back({at, last, true});
      }
      at = stop ? last + 1 : end;
    }
  }
  py::list texts(found.size()), odd;
  for (std::size_t i = 0; i < found.size(); ++i) {
    const Found& one = found[i];
    if (one.odd) odd.append(py::make_tuple(i, one.first - data.data(), one.last - data.data()));
    texts[i] = one.odd ? py::bytes() : py::bytes(one.first, one.last - one.first);
  }
  return py::make_tuple(texts, odd);
}

using States = py::array_t<std::uint8_t, py::array::c_style>;

py::tuple character_states(const py::list& texts, const States& states) {
  constexpr std::size_t num_points = 0x110000;
  if (states.size() != num_points) throw py::value_error("states must have one for each code point");
  std::vector<std::string_view> views;
  views.reserve(texts.size());
  for (const py::handle text : texts) views.emplace_back(py::reinterpret_borrow<py::bytes>(text));
  States worst(static_cast<py::ssize_t>(views.size()));
  std::uint8_t* const out = worst.mutable_data();
  const std::uint8_t* const state = states.data();
  std::vector<bool> seen;
  std::vector<std::uint32_t> unknown;
  bool valid = true;
  {
    py::gil_scoped_release unlocked;
    for (std::size_t i = 0; i < views.size(); ++i) {
      std::uint8_t most = 0;
      const char* at = views[i].data();
      for (const char* const end = at + views[i].size(); at < end;) {
        if (end - at >= 8 && !(load(at) & high_bits)) {
          at += 8;
        } else if (!(*at & 0x80)) {
          ++at;
        } else {
          const std::int32_t point = code_point(at, end);
          if (point < 0) {
            valid = false;
            break;
          }
          // Read once: another thread may learn the character just then, and it must count as known or as unknown.
          const std::uint8_t known = __atomic_load_n(state + point, __ATOMIC_RELAXED);
          most = std::max(most, known);
          if (known) continue;
          if (seen.empty()) seen.resize(num_points);
          if (!seen[point]) unknown.push_back(point);
          seen[point] = true;
        }
      }
      out[i] = most;
    }
  }
  if (!valid) throw py::value_error("a text is not UTF-8");
  return py::make_tuple(worst, py::array_t<std::uint32_t>(static_cast<py::ssize_t>(unknown.size()), unknown.data()));
}

template <class Token>
py::array_t<std::int64_t> join_documents(const py::array_t<std::uint32_t, py::array::c_style>& tokens,
                                          const py::array_t<std::int64_t, py::array::c_style>& lengths,
                                          std::int64_t begin, std::int64_t end,
                                          py::array_t<Token, py::array::c_style>& out) {
  megalite::check_aligned(tokens, lengths, out);
  // Checked as they are copied: another thread may write to `lengths` once the GIL is released.
  const std::vector<std::int64_t> length(lengths.data(), lengths.data() + lengths.size());
  std::int64_t left = tokens.size();
  for (const std::int64_t one : length) {
    if (one < 1 || one > left) throw py::value_error("lengths must be positive, and sum to that of tokens");
    left -= one;
  }
  // There are no more lengths than tokens, so that nothing here overflows.
  if (left != 0 || out.size() - tokens.size() < 2 * lengths.size()) {
    throw py::value_error("tokens must have sum(lengths), and out two more for each");
  }
  if (std::max(begin, end) > std::numeric_limits<Token>::max()) {
    throw py::value_error("begin or end does not fit the type of out");
  }
  py::array_t<std::int64_t> joined(lengths.size());
  std::int64_t* const size = joined.mutable_data();
  const std::uint32_t* from = tokens.data();
  Token* to = out.mutable_data();
  std::uint32_t every_bit = 0;
  {
    py::gil_scoped_release unlocked;
    for (std::size_t i = 0; i < length.size(); ++i) {
      const Token* const first = to;
      if (begin >= 0 && *from != begin) *to++ = static_cast<Token>(begin);
      for (const std::uint32_t* const last = from + length[i]; from < last;) {
        every_bit |= *from;
        *to++ = static_cast<Token>(*from++);
      }
      if (end >= 0 && from[-1] != end) *to++ = static_cast<Token>(end);
      size[i] = to - first;
    }
  }
  if (every_bit > static_cast<std::uint32_t>(std::numeric_limits<Token>::max())) {
    throw py::value_error("a token does not fit the type of out");
  }
  return joined;
}

}  // namespace

void megalite::define_texts(py::module_& module) {
  module.def("json_texts", &json_texts, py::arg("lines"), py::arg("key"), py::arg("longest"),
             "The text under `key` of each of these lines of JSON, as UTF-8.\n\n"
             "A line that is not plainly right, is longer than `longest` bytes, or has an empty text gets b'' and is also\n"
             "returned as (its number from 0, first byte, last byte): what is in it is for the caller to find out.\n"
             "Returns (list of bytes, list of such).");
  module.def("character_states", &character_states, py::arg("texts"), py::arg("states").noconvert(),
             "Of characters that are not ASCII: the highest of their states in each text, [n] uint8, and those of\n"
             "state 0, each once, uint32.\n\n"
             "texts: list of bytes, UTF-8; states: [0x110000] uint8. Raises ValueError for what is not UTF-8.");
  const char* const doc =
      "Write documents end to end as the type of `out`, with `begin` before each that does not begin with it, and `end`\n"
      "after each that does not end with it; -1: none. Returns the lengths they then have, [n] int64.\n\n"
      "tokens: [sum(lengths)] uint32; lengths: [n] int64, none of them 0; out: [sum(lengths) + 2 n] or more. Raises\n"
      "ValueError where they do not fit each other, or a token does not fit `out`.";
  const auto define = [&](auto join) {
    module.def("join_documents", join, py::arg("tokens").noconvert(), py::arg("lengths").noconvert(), py::arg("begin"),
               py::arg("end"), py::arg("out").noconvert(), doc);
  };
  define(&join_documents<std::uint16_t>);
  define(&join_documents<std::int32_t>);
}
