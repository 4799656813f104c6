// Argument checks of the ops: one way to say what was expected, what came, and what to do about it.
//
// Two exceptions exist: std::invalid_argument (ValueError in Python) for shapes, dtypes, devices, strides and
// numbers, and std::out_of_range (IndexError) for indices found inside tensors.
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

namespace tranche {

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// The checks of one call of one op. Every method throws unless its condition holds.
class Checks {
 public:
  explicit constexpr Checks(const char* op) : op_(op) {}

  // "tranche.<op>: expected <expected>, got <got>. <remedy>"
  void that(bool holds, const std::string& expected, const std::string& got,
            const std::string& remedy) const {
    if (!holds) throw std::invalid_argument(message(expected, got, remedy));
  }

  // Two sizes that must agree, each named as one would write it in Python.
  void equal(const char* name, int64_t got, const char* other_name, int64_t other,
             const std::string& remedy) const {
    if (got != other) {
      throw std::invalid_argument(
          message(concat(name, " == ", other_name, " (", other, ")"), concat(got), remedy));
    }
  }

  // What the host read from a tensor: as `that`, and an IndexError.
  void index(bool holds, const std::string& expected, const std::string& got,
             const std::string& remedy) const {
    if (!holds) throw std::out_of_range(message(expected, got, remedy));
  }

  // name[position] in [low, high].
  void in_range(const char* name, int64_t position, int64_t got, int64_t low, int64_t high,
                const std::string& remedy) const {
    if (got < low || got > high) {
      index(false, concat(name, "[", position, "] in [", low, ", ", high, "]"), concat(got), remedy);
    }
  }

 private:
  std::string message(const std::string& expected, const std::string& got, const std::string& remedy) const {
    return concat("tranche.", op_, ": expected ", expected, ", got ", got, ". ", remedy);
  }

  const char* op_;
};

}  // namespace tranche
