// The checks that ops of images share.
#pragma once

#include "core/torch_glue.h"

namespace tranche {

// The types that the backend computes with.
inline void check_floats(const TensorChecks& check, Phrase name, const Tensor& tensor) {
#if defined(TRANCHE_BACKEND_CPU)
  check.dtype(name, tensor, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16, ScalarType::Double});
#else
  check.dtype(name, tensor, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16});
#endif
}

inline void check_image_shape(const TensorChecks& check, const Tensor& x) {
  check.dim("x", x, 4, "[B, C, H, W]");
  for (int i = 0; i < 4; ++i) {
    check.that(x.size(i) <= INT32_MAX, "sizes of x below 2^31", shape_text(x), "Cut the input in pieces.");
  }
}

inline void check_images(const TensorChecks& check, const Tensor& x) {
  check_image_shape(check, x);
  check_floats(check, "x", x);
}

}  // namespace tranche
