#include "pconv/partial_conv2d_mma.cuh"

#include "core/dispatch.h"

namespace tranche::cuda {
namespace {

using Traits = PartialConv2dTraits;

size_t element_size(DType type) { return type == DType::f32 ? 4 : 2; }

unsigned blocks_for(int64_t items, int64_t per_block) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  if (blocks > INT32_MAX) throw std::runtime_error("tranche: partial_conv2d: more than 2^31 - 1 blocks");
  return unsigned(blocks);
}

// 16 bytes at a time where all of p lies so, element by element elsewhere.
struct Bytes16 {
  uint4 bytes;
};

template <class T>
bool in_units(CopyChannelsParams& p) {
  constexpr int kElements = int(16 / sizeof(T));
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  const int64_t *from = p.from_stride, *to = p.to_stride;
  const bool last = from[1] == 1 && to[1] == 1;
  const bool planes = from[3] == 1 && to[3] == 1 && from[2] == p.width && to[2] == p.width;
  bool good = aligned(p.from) && aligned(p.to) && (last || planes);
  for (int i = 0; i < 4; ++i) {
    if (i == (last ? 1 : 3) || (!last && i == 2)) continue;
    good = good && from[i] % kElements == 0 && to[i] % kElements == 0;
  }
  if (last) {
    good = good && p.channels % kElements == 0 && p.skip % kElements == 0 && p.skip_end % kElements == 0;
  } else {
    good = good && p.height * p.width % kElements == 0;
  }
  if (!good) return false;
  for (int i = 0; i < 4; ++i) {
    p.from_stride[i] = p.from_stride[i] == 1 ? 1 : p.from_stride[i] / kElements;
    p.to_stride[i] = p.to_stride[i] == 1 ? 1 : p.to_stride[i] / kElements;
  }
  if (last) {
    p.channels /= kElements;
    p.skip /= kElements;
    p.skip_end /= kElements;
  } else {  // an image is one row
    p.width = p.height * p.width / kElements;
    p.height = 1;
    p.from_stride[3] = p.to_stride[3] = 1;
  }
  return true;
}

template <class T>
void copy_channels(CopyChannelsParams p, void* stream) {
  const bool units = in_units<T>(p);
  const int64_t kept = int64_t(p.channels) - (p.skip_end - p.skip);
  const unsigned blocks = blocks_for(p.batch * p.height * p.width * kept, Traits::kThreads);
  launch("copy_channels", units ? copy_channels_kernel<Bytes16> : copy_channels_kernel<T>,
         {dim3(blocks), dim3(Traits::kThreads)}, stream, p);
}

// The strides of a dense [B, H, W, C], in the order B, C, H, W.
void set_dense(int64_t (&strides)[4], const PartialConv2dParams& p) {
  strides[0] = p.out_height * p.out_width * p.c_out;
  strides[1] = 1;
  strides[2] = p.out_width * p.c_out;
  strides[3] = p.c_out;
}

// Tensor cores serve 16-bit types and one group, by the weight's geometry alone.
struct MmaPlan {
  PartialConv2dMmaParams params{};
  size_t shared = 0, packed_bytes = 0;
  bool serves = false;

  explicit MmaPlan(const PartialConv2dParams& p) {
    using Mma = PartialConv2dMmaTraits;
    if (p.type == DType::f32 || p.groups != 1) return;
    const int64_t taps = int64_t(p.kernel[0]) * p.kernel[1];
    const int64_t rows = int64_t(Mma::kRows - 1) * p.stride[0] + int64_t(p.kernel[0] - 1) * p.dilation[0] + 1;
    const int64_t columns =
        int64_t(Mma::kColumns - 1) * p.stride[1] + int64_t(p.kernel[1] - 1) * p.dilation[1] + 1;
    if (rows > 1024 || columns > 1024) return;
    shared = 16 * size_t(2 * rows * columns + taps * 2 * Mma::kOutputs);
    if (shared > Mma::kMostShared) return;
    serves = true;
    const int tiles = (p.c_out + Mma::kOutputs - 1) / Mma::kOutputs;
    params.conv = p;
    params.chunks = (p.c_in + Mma::kChunk - 1) / Mma::kChunk;
    params.halo_rows = int32_t(rows);
    params.halo_columns = int32_t(columns);
    params.tiles_x = int32_t((p.out_width + Mma::kColumns - 1) / Mma::kColumns);
    params.tiles_y = int32_t((p.out_height + Mma::kRows - 1) / Mma::kRows);
    packed_bytes = size_t(tiles) * size_t(params.chunks) * size_t(taps) * Mma::kChunk * Mma::kOutputs * 2;
    params.dense = p.x_stride[1] == 1 && p.x_stride[0] % kUnit == 0 && p.x_stride[2] % kUnit == 0 &&
                   p.x_stride[3] % kUnit == 0 && p.start % kUnit == 0 &&
                   reinterpret_cast<uintptr_t>(p.x) % 16 == 0;
  }
};

size_t staged_bytes(const PartialConv2dParams& p) {
  if (!p.in_place) return 0;
  const size_t bytes = size_t(p.batch) * size_t(p.out_height * p.out_width * p.c_out) * element_size(p.type);
  return (bytes + 255) / 256 * 256;
}

template <class T>
void run_mma(MmaPlan& plan, const PartialConv2dParams& conv, void* packed, void* stream) {
  using Mma = PartialConv2dMmaTraits;
  plan.params.conv = conv;
  plan.params.packed = packed;
  launch("partial_conv2d_pack", partial_conv2d_pack_kernel<T>,
         {dim3(blocks_for(int64_t(plan.packed_bytes / 2), Traits::kThreads)), dim3(Traits::kThreads)}, stream,
         plan.params);
  const int64_t tiles = int64_t(conv.batch) * plan.params.tiles_x * plan.params.tiles_y;
  launch("partial_conv2d_mma", partial_conv2d_mma_kernel<T>,
         {dim3(blocks_for(tiles, 1), unsigned((conv.c_out + Mma::kOutputs - 1) / Mma::kOutputs)),
          dim3(Mma::kThreads), plan.shared},
         stream, plan.params);
}

template <class T>
void run(const PartialConv2dParams& p, void* stream) {
  PartialConv2dParams conv = p;
  if (p.in_place) {
    // Blocks run in any order, so the outputs wait beside x until all inputs have been read.
    conv.y = p.workspace;
    conv.y_start = 0;
    set_dense(conv.y_stride, p);
  }
  const int64_t pixels = int64_t(p.batch) * p.out_height * p.out_width;
  const bool depthwise = p.c_in == p.groups && p.c_out == p.groups && p.groups > 1;
  MmaPlan mma(p);
  bool done = false;
  if constexpr (sizeof(T) == 2) {
    if (mma.serves) run_mma<T>(mma, conv, static_cast<char*>(p.workspace) + staged_bytes(p), stream);
    done = mma.serves;
  }
  if (done) {
    // the tensor cores have it
  } else if (depthwise) {
    const unsigned blocks = blocks_for(pixels * p.c_out, Traits::kThreads);
    launch("partial_conv2d_depthwise", partial_conv2d_depthwise_kernel<T>,
           {dim3(blocks), dim3(Traits::kThreads)}, stream, conv);
  } else {
    const int group_out = p.c_out / p.groups;
    const unsigned tiles =
        unsigned(p.groups) * unsigned((group_out + Traits::kOutputs - 1) / Traits::kOutputs);
    launch("partial_conv2d", partial_conv2d_kernel<T>,
           {dim3(blocks_for(pixels, Traits::kPixels), tiles), dim3(Traits::kThreads)}, stream, conv);
  }

  CopyChannelsParams copy{};
  copy.batch = p.batch;
  copy.height = p.out_height;
  copy.width = p.out_width;
  for (int i = 0; i < 4; ++i) copy.to_stride[i] = p.y_stride[i];
  if (p.in_place) {
    copy.from = p.workspace;
    copy.to = static_cast<T*>(p.y) + p.y_start * p.y_stride[1];
    copy.channels = p.c_out;
    set_dense(copy.from_stride, p);
    copy_channels<T>(copy, stream);
  } else if (p.copies) {
    copy.from = p.x;
    copy.to = p.y;
    copy.channels = p.channels;
    copy.skip = p.start;
    copy.skip_end = p.start + p.c_in;
    for (int i = 0; i < 4; ++i) copy.from_stride[i] = p.x_stride[i];
    copy_channels<T>(copy, stream);
  }
}

}  // namespace

size_t partial_conv2d_workspace(const PartialConv2dParams& p) {
  return staged_bytes(p) + MmaPlan(p).packed_bytes;
}

void partial_conv2d(const PartialConv2dParams& p, void* stream) {
  with_type<float, half, bf16>("partial_conv2d", p.type, [&](auto t) { run<decltype(t)>(p, stream); });
}

}  // namespace tranche::cuda
