// Argument checks of the ops: one way to say what was expected, what came, and what to do about it.
//
// Two exceptions exist: std::invalid_argument (ValueError in Python) for shapes, dtypes, devices, strides and
// numbers, and std::out_of_range (IndexError) for indices found inside tensors.
#pragma once

#include <cmath>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>

namespace tranche {

// Parts of a message, side by side. They are kept by reference and become text when somebody reads it, so
// that a check that holds costs no more than its condition: an op makes dozens of them. Use it within the
// full expression that makes it, or turn it into a std::string.
template <class... Parts>
class Text {
 public:
  explicit Text(const Parts&... parts) : parts_(parts...) {}

  operator std::string() const {
    std::ostringstream out;
    out << *this;
    return out.str();
  }

  friend std::ostream& operator<<(std::ostream& out, const Text& text) {
    std::apply([&](const Parts&... parts) { (out << ... << parts); }, text.parts_);
    return out;
  }

 private:
  std::tuple<const Parts&...> parts_;
};

template <class... Parts>
Text<Parts...> concat(const Parts&... parts) {
  return Text<Parts...>(parts...);
}

// An argument that is text of any kind, not written yet: a literal, a string, a Text, or what a stream takes.
class Phrase {
 public:
  Phrase(const char* text)
      : object_(text),
        write_([](std::ostream& out, const void* it) { out << static_cast<const char*>(it); }) {}
  template <class T>
  Phrase(const T& object)
      : object_(&object),
        write_([](std::ostream& out, const void* it) { out << *static_cast<const T*>(it); }) {}

  friend std::ostream& operator<<(std::ostream& out, const Phrase& phrase) {
    phrase.write_(out, phrase.object_);
    return out;
  }

 private:
  const void* object_;
  void (*write_)(std::ostream&, const void*);
};

// The checks of one call of one op. Every method throws unless its condition holds.
class Checks {
 public:
  explicit constexpr Checks(const char* op) : op_(op) {}

  // "tranche.<op>: expected <expected>, got <got>. <remedy>"
  void that(bool holds, Phrase expected, Phrase got, Phrase remedy) const {
    if (!holds) throw std::invalid_argument(message(expected, got, remedy));
  }

  // Two sizes that must agree, each named as one would write it in Python.
  void equal(Phrase name, int64_t got, Phrase other_name, int64_t other, Phrase remedy) const {
    that(got == other, concat(name, " == ", other_name, " (", other, ")"), got, remedy);
  }

  // What the host read from a tensor: as `that`, and an IndexError.
  void index(bool holds, Phrase expected, Phrase got, Phrase remedy) const {
    if (!holds) throw std::out_of_range(message(expected, got, remedy));
  }

  // name[position] in [low, high].
  void in_range(Phrase name, int64_t position, int64_t got, int64_t low, int64_t high, Phrase remedy) const {
    index(got >= low && got <= high, concat(name, "[", position, "] in [", low, ", ", high, "]"), got,
          remedy);
  }

 private:
  std::string message(const Phrase& expected, const Phrase& got, const Phrase& remedy) const {
    return concat("tranche.", op_, ": expected ", expected, ", got ", got, ". ", remedy);
  }

  const char* op_;
};

}  // namespace tranche
