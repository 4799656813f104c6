// From a DType to the C++ type that a kernel is compiled for.
#pragma once

#include <stdexcept>
#include <string>

#include "core/numeric.h"

namespace tranche {

// Internal linkage here and below: a CPU kernel's file is compiled for several instruction sets.
[[noreturn]] static inline void no_kernel_for(const char* op, DType type) {
  const char* names[] = {"float64", "float32", "float16", "bfloat16", "float8_e4m3fn"};
  throw std::logic_error(std::string("tranche: ") + op + ": no kernel for " + names[int(type)]);
}

// f(T()) with the one of the types that `type` names. An op's checks admit no others.
template <class T, class... Others, class F>
static inline auto with_type(const char* op, DType type, const F& f) -> decltype(f(T())) {
  if (type == dtype_of<T>::value) return f(T());
  if constexpr (sizeof...(Others) > 0) {
    return with_type<Others...>(op, type, f);
  } else {
    no_kernel_for(op, type);
  }
}

}  // namespace tranche
