// Weights are packed once: the words of a tile's rows, one after another.
#include "bits/bits_pack.h"
#include "core/isa.h"
#include "core/parallel.h"

namespace tranche::cpu::TRANCHE_ISA {

void bits_pack(const BitsPackParams& p) {
  parallel_for(p.row_tiles, [&p](int64_t row_tile) {
    for (int64_t t = 0; t < p.input_tiles; ++t) {
      for (int row = 0; row < kTileRows; ++row) pack_tile_row(p, row_tile * p.input_tiles + t, row);
    }
  });
}

}  // namespace tranche::cpu::TRANCHE_ISA

TRANCHE_CPU_ENTRY(void, bits_pack, BitsPackParams)
