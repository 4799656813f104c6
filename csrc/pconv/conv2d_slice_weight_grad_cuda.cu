#include "pconv/conv2d_slice_weight_grad_mma.cuh"

#include "core/dispatch.h"

namespace tranche::cuda {
namespace {

using Traits = WeightGradTraits;

// Chunks are whole stages, long enough that partial gradients are little beside the work, and few enough that
// the workspace stays small. Their places depend on shapes alone.
constexpr int64_t kChunkPixels = 2048, kMostChunks = 256, kMostPartial = 32 << 20;

unsigned grid_size(int64_t blocks, int64_t most) {
  if (blocks > most) {
    throw std::runtime_error(
        "tranche: conv2d_slice_weight_grad: the weight has too many channels for a grid");
  }
  return unsigned(blocks);
}

WeightGradParams make_params(const Conv2dSliceWeightGradParams& g) {
  WeightGradParams p{};
  p.grad = g;
  p.partials = static_cast<float*>(g.workspace);
  const int64_t pixels = int64_t(g.batch) * g.out_height * g.out_width;
  const int64_t size = int64_t(g.c_out) * (g.c_in / g.groups) * g.kernel[0] * g.kernel[1];
  int64_t most = kMostPartial / size < kMostChunks ? kMostPartial / size : kMostChunks;
  if (most < 1) most = 1;
  p.chunk_pixels = (pixels + most - 1) / most;
  if (p.chunk_pixels < kChunkPixels) p.chunk_pixels = kChunkPixels;
  constexpr int kStage = WeightGradMmaTraits::kPixels;
  p.chunk_pixels = (p.chunk_pixels + kStage - 1) / kStage * kStage;
  p.chunks = (pixels + p.chunk_pixels - 1) / p.chunk_pixels;
  const auto dense = [](const void* data, const int64_t (&stride)[4]) {
    return stride[1] == 1 && stride[0] % kUnit == 0 && stride[2] % kUnit == 0 && stride[3] % kUnit == 0 &&
           reinterpret_cast<uintptr_t>(data) % 16 == 0;
  };
  p.dense_x = dense(g.x, g.x_stride) && g.start % kUnit == 0;
  p.dense_y = dense(g.grad_y, g.y_stride);
  return p;
}

template <class T>
void run(const WeightGradParams& p, void* stream) {
  const Conv2dSliceWeightGradParams& g = p.grad;
  const int64_t group_in = g.c_in / g.groups, group_out = g.c_out / g.groups;
  const int64_t taps = int64_t(g.kernel[0]) * g.kernel[1], size = g.c_out * group_in * taps;
  const unsigned chunks = unsigned(p.chunks);
  const auto tiles = [](int64_t n, int64_t tile) { return (n + tile - 1) / tile; };
  constexpr int64_t kMostX = INT32_MAX, kMostY = 65535;
  if (is_depthwise(g)) {
    const dim3 grid(grid_size(tiles(g.c_out, Traits::kChannels), kMostX), grid_size(taps, kMostY), chunks);
    launch("weight_grad_depthwise", weight_grad_depthwise_kernel<T>, {grid, dim3(Traits::kThreads)}, stream,
           p);
  } else if constexpr (sizeof(T) == 2) {
    using Mma = WeightGradMmaTraits;
    const int64_t units = tiles(group_in, kUnit) * taps;
    const dim3 grid(grid_size(tiles(units, Mma::kColumnUnits), kMostX),
                    grid_size(g.groups * tiles(group_out, Mma::kOutputs), kMostY), chunks);
    launch("weight_grad_mma", weight_grad_mma_kernel<T>,
           {grid, dim3(Mma::kThreads), 2 * Mma::kStage * sizeof(uint4)}, stream, p);
  } else {
    const dim3 grid(grid_size(tiles(group_in * taps, Traits::kColumns), kMostX),
                    grid_size(g.groups * tiles(group_out, Traits::kOutputs), kMostY), chunks);
    launch("weight_grad", weight_grad_kernel<T>, {grid, dim3(Traits::kThreads)}, stream, p);
  }
  launch("weight_grad_merge", weight_grad_merge_kernel<T>,
         {dim3(grid_size(tiles(size, Traits::kThreads), kMostX)), dim3(Traits::kThreads)}, stream, p);
}

}  // namespace

size_t conv2d_slice_weight_grad_workspace(const Conv2dSliceWeightGradParams& g) {
  const int64_t size = int64_t(g.c_out) * (g.c_in / g.groups) * g.kernel[0] * g.kernel[1];
  return size_t(make_params(g).chunks * size) * sizeof(float);
}

void conv2d_slice_weight_grad(const Conv2dSliceWeightGradParams& g, void* stream) {
  with_type<float, half, bf16>("conv2d_slice_weight_grad", g.type,
                               [&](auto t) { run<decltype(t)>(make_params(g), stream); });
}

}  // namespace tranche::cuda
