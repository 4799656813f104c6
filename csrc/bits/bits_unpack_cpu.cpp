// Inspection and hot copies: the words of a tile's rows, one after another.
#include "bits/bits_unpack.h"

#include "core/isa.h"
#include "core/parallel.h"

namespace tranche::cpu::TRANCHE_ISA {

void bits_unpack(const BitsUnpackParams& p) {
  parallel_for(p.w.row_tiles, [&p](int64_t row_tile) {
    for (int row = 0; row < kTileRows; ++row) {
      for (int64_t t = 0; t < p.w.input_tiles; ++t) {
        unpack_tile_row(p, row_tile * p.w.input_tiles + t, row);
      }
    }
  });
}

}  // namespace tranche::cpu::TRANCHE_ISA

TRANCHE_CPU_ENTRY(void, bits_unpack, BitsUnpackParams)
