#include "bits/bits_round.cuh"

namespace tranche::cuda {

void bits_round(const BitsRoundParams& p, void* stream) {
  const int64_t blocks = (p.count + 255) / 256;
  launch("bits_round", bits_round_kernel, {dim3(unsigned(blocks < 65536 ? blocks : 65536)), dim3(256)},
         stream, p);
}

}  // namespace tranche::cuda
