// tranche::limit_read: schema, checks, allocation.
#include "core/limit_read.h"

#include "core/torch_glue.h"

namespace tranche {
namespace {

constexpr int64_t kLineWords = 8;

Tensor limit_read(const Tensor& buffer) {
  const TensorChecks check("limit_read");
  check.dim("buffer", buffer, 1, "[words]");
  check.dtype("buffer", buffer, {ScalarType::Long});
  check.contiguous("buffer", buffer);
  check.that(buffer.size(0) % kLineWords == 0, "buffer.size(0) a multiple of 8", buffer.size(0),
             "Read whole cache lines.");
  check.that(reinterpret_cast<uintptr_t>(buffer.const_data_ptr()) % 64 == 0, "a 64-byte aligned buffer",
             "another address", "Pass a whole allocation.");

  LimitReadParams params{};
  params.words = buffer.size(0);
#if defined(TRANCHE_BACKEND_CPU)
  params.parts = 64;
#else
  params.parts = 1024;
#endif
  Tensor checksum = empty_on(buffer, {params.parts}, ScalarType::Long);
  params.buffer = data<uint64_t>(buffer);
  params.checksum = mutable_data<uint64_t>(checksum);
  RUN_KERNEL(limit_read, params, buffer, checksum);
  return checksum;
}

REGISTER_OP(limit_read, "(Tensor buffer) -> Tensor")

}  // namespace
}  // namespace tranche
