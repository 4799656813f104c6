#include "bits/bits_pack.cuh"

namespace tranche::cuda {

void bits_pack(const BitsPackParams& p, void* stream) {
  const int64_t blocks = (p.row_tiles * p.input_tiles * kTileRows + 255) / 256;
  launch("bits_pack", bits_pack_kernel, {dim3(unsigned(blocks < 65536 ? blocks : 65536)), dim3(256)}, stream,
         p);
}

}  // namespace tranche::cuda
