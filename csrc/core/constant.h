// A number as an argument: f(Constant<4>()) gives f a loop's length, or a choice, while it is compiled.
#pragma once

namespace tranche {

template <auto number>
struct Constant {
  static constexpr auto value = number;
};

}  // namespace tranche
