// The check that ops of images share.
#pragma once

#include "core/torch_glue.h"

namespace tranche {

inline void check_images(const TensorChecks& check, const Tensor& x) {
  check.dim("x", x, 4, "[B, C, H, W]");
#if defined(TRANCHE_BACKEND_CPU)
  check.dtype("x", x, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16, ScalarType::Double});
#else
  check.dtype("x", x, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16});
#endif
  for (int i = 0; i < 4; ++i) {
    check.that(x.size(i) <= INT32_MAX, "sizes of x below 2^31", shape_text(x), "Cut the input in pieces.");
  }
}

}  // namespace tranche
