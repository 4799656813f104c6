// Chooses the path, prepares the activations, and runs it.
#include "bits/bits_linear.h"

#include "bits/bits_linear_cpu.h"
#include "bits/bits_linear_cpu_dot.h"
#include "bits/bits_linear_cpu_float.h"
#include "core/isa.h"
#if defined(__AMX_INT8__)
#include "bits/bits_linear_cpu_amx.h"
#endif

namespace tranche::cpu {
void bits_quantize_activations(const BitsQuantizeActivationsParams&);
}

namespace tranche::cpu::TRANCHE_ISA {

namespace {

// Tiles pay from this many rows on. Groups must end where a tile's 64 inputs end.
bool uses_tiles(const BitsLinearParams& p) {
#if defined(__AMX_INT8__)
  constexpr int64_t kFewestRows = 5;
  const bool groups_fit = p.groups == 1 || p.w.in_features / p.groups % 64 == 0;
  return p.kind != LinearKind::weight_only && p.rows >= kFewestRows && groups_fit;
#else
  (void)p;
  return false;
#endif
}

Codes prepare_codes(const BitsLinearParams& p, const Workspace& space, bool tiles) {
  char* base = static_cast<char*>(p.workspace);
  BitsQuantizeActivationsParams q{};
  q.x = p.x;
  q.codes = reinterpret_cast<int8_t*>(base);
  q.scale = reinterpret_cast<float*>(base + space.scale);
  q.row_sum = reinterpret_cast<int32_t*>(base + space.row_sum);
  q.x_stride = p.x_stride;
  q.rows = p.rows;
  q.inputs = p.w.in_features;
  q.padded_rows = space.padded_rows;
  q.padded_inputs = space.padded_inputs;
  q.groups = p.groups;
  q.tile_rows = tiles ? 16 : 1;
  q.x_type = p.type;
  q.x_is_codes = p.kind == LinearKind::integers;
  cpu::bits_quantize_activations(q);
  return {q.codes, q.scale, q.row_sum, space.padded_rows, space.padded_inputs};
}

}  // namespace

int64_t bits_linear_workspace(const BitsLinearParams& p) { return workspace_of(p, uses_tiles(p)).bytes; }

void bits_linear(const BitsLinearParams& p) {
  const bool tiles = uses_tiles(p);
  const Workspace space = workspace_of(p, tiles);
  if (p.kind == LinearKind::weight_only) {
    float* x = static_cast<float*>(p.workspace);
    if (p.type == DType::f32) {
      rows_to_float<float>(p, space, x);
    } else if (p.type == DType::f16) {
      rows_to_float<half>(p, space, x);
    } else {
      rows_to_float<bf16>(p, space, x);
    }
    linear_of_floats(p, x, space.padded_inputs);
    return;
  }
  const Codes x = prepare_codes(p, space, tiles);
#if defined(__AMX_INT8__)
  if (tiles) return linear_by_tiles(p, x);
#endif
  linear_by_dots(p, x);
}

}  // namespace tranche::cpu::TRANCHE_ISA

TRANCHE_CPU_ENTRY(void, bits_linear, BitsLinearParams)
TRANCHE_CPU_ENTRY(int64_t, bits_linear_workspace, BitsLinearParams)
