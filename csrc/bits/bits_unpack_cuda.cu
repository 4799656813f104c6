#include "bits/bits_unpack.cuh"

namespace tranche::cuda {

void bits_unpack(const BitsUnpackParams& p, void* stream) {
  const int64_t blocks = (p.w.row_tiles * p.w.input_tiles * kTileRows + 255) / 256;
  launch("bits_unpack", bits_unpack_kernel, {dim3(unsigned(blocks < 65536 ? blocks : 65536)), dim3(256)},
         stream, p);
}

}  // namespace tranche::cuda
