// What both fake-quantization ops ask of their tensors.
#pragma once

#include "core/torch_glue.h"

namespace tranche {

inline void check_float(const TensorChecks& check, Phrase name, const Tensor& tensor) {
  check.dtype(name, tensor, {ScalarType::Float, ScalarType::Double, ScalarType::Half, ScalarType::BFloat16});
}

// A scale or zero: float32, or float64 beside float64.
inline void check_learned(const TensorChecks& check, Phrase name, const Tensor& tensor, Phrase other_name,
                          const Tensor& other) {
  const bool wide = other.scalar_type() == ScalarType::Double;
  check.dtype(name, tensor, {wide ? ScalarType::Double : ScalarType::Float});
  check.same_device(name, tensor, other_name, other);
  check.contiguous(name, tensor);
}

inline void check_grad(const TensorChecks& check, const Tensor& grad, Phrase other_name,
                       const Tensor& other) {
  check.dtype("grad", grad, {other.scalar_type()});
  bool same = grad.dim() == other.dim();
  for (int64_t i = 0; same && i < grad.dim(); ++i) same = grad.size(i) == other.size(i);
  check.that(same, concat("grad of the shape of ", other_name, " ", shape_text(other)), shape_text(grad),
             "Pass the gradient of the result.");
  check.same_device("grad", grad, other_name, other);
  check.contiguous("grad", grad);
}

}  // namespace tranche
