// Chooses the arithmetic, prepares the activations, and runs it.
#include "bits/bits_linear.h"

#include "bits/bits_linear_cpu.h"
#include "bits/bits_linear_cpu_blocks.h"
#include "core/isa.h"
#if defined(__AMX_INT8__)
#include "bits/bits_linear_cpu_amx.h"
#endif

namespace tranche::cpu {
void bits_quantize_activations(const BitsQuantizeActivationsParams&);
}

namespace tranche::cpu::TRANCHE_ISA {

namespace {

// AMX pays from this many rows on. Groups must end where a tile's 64 inputs end.
bool uses_tiles(const BitsLinearParams& p) {
#if defined(__AMX_INT8__)
  constexpr int64_t kFewestRows = 5;
  const bool groups_fit = p.groups == 1 || p.w.in_features / p.groups % 64 == 0;
  return p.rows >= kFewestRows && groups_fit;
#else
  (void)p;
  return false;
#endif
}

// Never by the number of rows where the arithmetic would be another.
Form form_of(const BitsLinearParams& p) {
  if (p.kind != LinearKind::weight_only) return uses_tiles(p) ? Form::tiles_of_codes : Form::rows_of_codes;
#if defined(__AVX512BF16__)
  if (p.type == DType::bf16) return Form::bf16_pairs;
#endif
  return Form::floats;
}

void prepare_codes(const BitsLinearParams& p, const Workspace& space, Form form) {
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
  q.tile_rows = form == Form::tiles_of_codes ? 16 : 1;
  q.x_type = p.type;
  q.x_is_codes = p.kind == LinearKind::integers;
  cpu::bits_quantize_activations(q);
}

template <class T>
void prepare_floats(const BitsLinearParams& p, const Workspace& space) {
  parallel_for(space.padded_rows, [&p, &space](int64_t row) {
    float* line = static_cast<float*>(p.workspace) + row * space.padded_inputs;
    const int64_t inputs = row < p.rows ? p.w.in_features : 0;
    if (inputs > 0) row_to_float(static_cast<const T*>(p.x) + row * p.x_stride, line, int(inputs));
    for (int64_t i = inputs; i < space.padded_inputs; ++i) line[i] = 0.0f;
  });
}

// Of every four inputs the first with the third, and the second with the fourth.
void prepare_pairs(const BitsLinearParams& p, const Workspace& space) {
  parallel_for(space.padded_rows, [&p, &space](int64_t row) {
    uint16_t* line = static_cast<uint16_t*>(p.workspace) + row * space.padded_inputs;
    const int64_t inputs = row < p.rows ? p.w.in_features : 0;
    const uint16_t* x = static_cast<const uint16_t*>(p.x) + row * p.x_stride;
    for (int64_t i = 0; i < space.padded_inputs; i += 4) {
      uint16_t four[4] = {};
      __builtin_memcpy(four, x + i, i + 4 <= inputs ? 8 : i < inputs ? size_t(2 * (inputs - i)) : 0);
      const uint16_t paired[4] = {four[0], four[2], four[1], four[3]};
      __builtin_memcpy(line + i, paired, 8);
    }
  });
}

Activations prepare(const BitsLinearParams& p, const Workspace& space, Form form) {
  char* base = static_cast<char*>(p.workspace);
  Activations x{base, nullptr, nullptr, nullptr, space.padded_rows, space.padded_inputs};
  x.scratch = reinterpret_cast<uint8_t*>(base + space.scratch);
  if (form == Form::bf16_pairs) {
    prepare_pairs(p, space);
  } else if (form != Form::floats) {
    prepare_codes(p, space, form);
    x.scale = reinterpret_cast<const float*>(base + space.scale);
    x.row_sum = reinterpret_cast<const int32_t*>(base + space.row_sum);
  } else if (p.type == DType::f32) {
    prepare_floats<float>(p, space);
  } else if (p.type == DType::f16) {
    prepare_floats<half>(p, space);
  } else {
    prepare_floats<bf16>(p, space);
  }
  return x;
}

int64_t scratch_of_form(const BitsLinearParams& p, const Workspace& space, Form form) {
  switch (form) {
#if defined(__AMX_INT8__)
    case Form::tiles_of_codes:
      return tiles_scratch(p, space.padded_inputs);
#endif
#if defined(__AVX512BF16__)
    case Form::bf16_pairs:
      return blocks_scratch<Bf16Engine<true> >(p, space.padded_rows);
#endif
    case Form::floats:
      return blocks_scratch<FloatEngine>(p, space.padded_rows);
    default:
      return blocks_scratch<IntegerEngine>(p, space.padded_rows);
  }
}

}  // namespace

int64_t bits_linear_workspace(const BitsLinearParams& p) {
  const Form form = form_of(p);
  const Workspace space = workspace_of(p, form);
  return space.scratch + scratch_of_form(p, space, form);
}

void bits_linear(const BitsLinearParams& p) {
  const Form form = form_of(p);
  const Activations x = prepare(p, workspace_of(p, form), form);
  switch (form) {
    case Form::rows_of_codes:
      return linear_by_blocks<IntegerEngine>(p, x);
    case Form::floats:
      return linear_by_blocks<FloatEngine>(p, x);
#if defined(__AVX512BF16__)
    case Form::bf16_pairs:
      if (p.w.bits <= Bf16Engine<true>::kMostBitsOfTable) return linear_by_blocks<Bf16Engine<true> >(p, x);
      return linear_by_blocks<Bf16Engine<false> >(p, x);
#endif
#if defined(__AMX_INT8__)
    case Form::tiles_of_codes:
      return linear_by_tiles(p, x);
#endif
    default:
      return;  // form_of names no other on this instruction set
  }
}

}  // namespace tranche::cpu::TRANCHE_ISA

TRANCHE_CPU_ENTRY(void, bits_linear, BitsLinearParams)
TRANCHE_CPU_ENTRY(int64_t, bits_linear_workspace, BitsLinearParams)
