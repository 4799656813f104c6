#include "bits/bits_linear.cuh"

namespace tranche::cuda {

void bits_quantize_activations(const BitsQuantizeActivationsParams&, void* stream);

namespace {

struct Space {
  int64_t padded_inputs, scale, row_sum, bytes;
};

Space space_of(const BitsLinearParams& p) {
  const auto aligned = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
  Space s{};
  s.padded_inputs = p.w.input_tiles * kTileInputs;
  s.scale = aligned((p.kind == LinearKind::weight_only ? 4 : 1) * p.rows * s.padded_inputs);
  s.row_sum = s.scale + aligned(4 * p.rows);
  s.bytes = s.row_sum + aligned(4 * p.rows * p.groups);
  return s;
}

template <int planes, int columns>
void launch_integers(const BitsLinearLaunch& k, void* stream) {
  const unsigned passes = unsigned((k.p.rows + 8 * columns - 1) / (8 * columns)),
                 tiles = unsigned(k.p.w.row_tiles);
  const dim3 block(32 * kLinearWarps);
  if (k.p.groups == 1) {
    launch("bits_linear_integer", bits_linear_integer_kernel<planes, columns>, {dim3(tiles, passes), block},
           stream, k);
  } else {
    launch("bits_linear_group", bits_linear_group_kernel<planes, columns>,
           {dim3((tiles + kLinearWarps - 1) / kLinearWarps, passes), block}, stream, k);
  }
}

template <int planes, int rows>
void launch_floats(const BitsLinearLaunch& k, void* stream) {
  const dim3 grid(unsigned(k.p.w.row_tiles), unsigned((k.p.rows + rows - 1) / rows));
  launch("bits_linear_float", bits_linear_float_kernel<planes, rows>, {grid, dim3(32 * kLinearWarps)}, stream,
         k);
}

template <int planes>
void launch_planes(const BitsLinearLaunch& k, void* stream) {
  if (k.p.kind == LinearKind::weight_only) {
    // one row needs no registers for others; more than these would spill, beside all planes of a tile
    constexpr int kRows = planes == 8 || planes == kSinglePlanes ? 3 : 4;
    return k.p.rows == 1 ? launch_floats<planes, 1>(k, stream) : launch_floats<planes, kRows>(k, stream);
  }
  const bool few_rows = k.p.rows <= 8;  // one MMA column
  return few_rows ? launch_integers<planes, 1>(k, stream) : launch_integers<planes, 8>(k, stream);
}

void quantize(const BitsLinearParams& p, const BitsLinearLaunch& k, void* stream) {
  BitsQuantizeActivationsParams q{};
  q.x = p.x;
  q.codes = const_cast<int8_t*>(k.codes);
  q.scale = const_cast<float*>(k.x_scale);
  q.row_sum = const_cast<int32_t*>(k.row_sum);
  q.x_stride = p.x_stride;
  q.rows = q.padded_rows = p.rows;
  q.inputs = p.w.in_features;
  q.padded_inputs = k.padded_inputs;
  q.groups = p.groups;
  q.tile_rows = 1;
  q.x_type = p.type;
  q.x_is_codes = p.kind == LinearKind::integers;
  bits_quantize_activations(q, stream);
}

}  // namespace

int64_t bits_linear_workspace(const BitsLinearParams& p) { return space_of(p).bytes; }

void bits_linear(const BitsLinearParams& p, void* stream) {
  const Space space = space_of(p);
  char* base = static_cast<char*>(p.workspace);
  BitsLinearLaunch k{};
  k.p = p;
  k.codes = reinterpret_cast<const int8_t*>(base);
  k.floats = reinterpret_cast<const float*>(base);
  k.x_scale = reinterpret_cast<const float*>(base + space.scale);
  k.row_sum = reinterpret_cast<const int32_t*>(base + space.row_sum);
  k.padded_inputs = space.padded_inputs;
  if (p.kind == LinearKind::weight_only) {
    launch("bits_linear_widen", bits_linear_widen_kernel, {dim3(unsigned(p.rows)), dim3(256)}, stream, k);
  } else {
    quantize(p, k, stream);
  }
  if (p.w.single) return launch_planes<kSinglePlanes>(k, stream);
  switch (p.w.planes) {
    case 0:
      return launch_planes<kPlainCodes>(k, stream);
    case 3:
      return launch_planes<3>(k, stream);
    case 5:
      return launch_planes<5>(k, stream);
    case 7:
      return launch_planes<7>(k, stream);
    default:
      return launch_planes<8>(k, stream);
  }
}

}  // namespace tranche::cuda
