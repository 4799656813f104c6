// tranche::limit_math: schema, checks, allocation.
#include "core/limit_math.h"

#include "core/parallel.h"
#include "core/torch_glue.h"

namespace tranche {
namespace {

Tensor limit_math(const Tensor& like, int64_t kind, int64_t iterations) {
  const TensorChecks check("limit_math");
  check.that(kind >= 0 && kind <= int64_t(MathKind::int8), "kind 0 (fp32), 1 (bf16) or 2 (int8)", kind,
             "Name one of these.");
  check.that(iterations > 0, "iterations > 0", iterations, "Ask for some work.");
  LimitMathParams params{};
#if defined(TRANCHE_BACKEND_CPU)
  params.parts = num_threads();
#elif defined(TRANCHE_BACKEND_SIM)
  params.parts = 2;
#else
  params.parts = 1024;
#endif
  Tensor results = empty_on(like, {params.parts, 2}, ScalarType::Double);
  params.results = mutable_data<double>(results);
  params.iterations = iterations;
  params.kind = MathKind(kind);
  RUN_KERNEL(limit_math, params, like, results);
  return results;
}

REGISTER_OP(limit_math, "(Tensor like, int kind, SymInt iterations) -> Tensor")

}  // namespace
}  // namespace tranche
