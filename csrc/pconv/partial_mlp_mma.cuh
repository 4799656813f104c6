// The 1x1 layers of partial_mlp on tensor cores, for 16-bit types: a block computes 128 pixels by 64 outputs
// from chunks of 32 products, of which the next is on its way while the present one is multiplied. The first
// layer's chunks come from the convolution's results and from x as they lie: nothing is concatenated.
#pragma once

#include "pconv/mma_tile.cuh"
#include "pconv/partial_mlp.cuh"

namespace tranche {

template <bool kGated_>
struct PartialMlpMmaTraits {
  static constexpr bool kGated = kGated_;  // two more tiles of outputs, of which one column is the score
  static constexpr int kThreads = 128, kRowTiles = 2;
  static constexpr int kPixels = kThreads / 32 * kRowTiles * 16;
  static constexpr int kOutputs = 64;
  static constexpr int kColumns = kOutputs + (kGated ? 16 : 0);
  static constexpr int kChunk = 32, kUnits = kChunk / kUnit;
  static constexpr int kStage = kUnits * (kPixels + kColumns);  // units: pixels, then weights
};

// The unit of channels [k, k + 8) of a pixel's input to the layer.
template <class T, bool kSecond>
__device__ __forceinline__ void load_input_unit(const PartialMlpLayerParams& layer, int64_t pixel,
                                                bool inside, int k, uint4* to) {
  const PartialMlpParams& p = layer.mlp;
  const int depth = kSecond ? p.hidden : p.channels;
  const T* from = nullptr;
  if constexpr (kSecond) {
    if (k + kUnit <= depth) from = static_cast<const T*>(layer.hidden) + pixel * layer.hidden_stride + k;
  } else if (k + kUnit <= p.convolved) {
    from = static_cast<const T*>(layer.convolved) + pixel * layer.convolved_stride + k;
  } else if (layer.dense && p.gate == nullptr && k >= p.convolved && k + kUnit <= depth) {
    from = static_cast<const T*>(p.x) + (inside ? pixel_offset(p, p.x_stride, pixel) : 0) + k;
  }
  if (from != nullptr) {
    ptx::cp_async_16(to, from, inside);
    return;
  }
  *to = gather_unit<T>([&](int e) {
    if (!inside || k + e >= depth) return T{};
    if constexpr (kSecond) {
      return static_cast<const T*>(layer.hidden)[pixel * layer.hidden_stride + k + e];
    } else {
      return from_float<T>(mixed_channel<T>(layer, pixel, k + e));
    }
  });
}

// The unit [k, k + 8) of row n of a matrix [rows, depth].
template <class T>
__device__ __forceinline__ void load_weight_unit(const T* weight, int n, int rows, int k, int depth,
                                                 bool dense, uint4* to) {
  const T* row = weight + int64_t(n < rows ? n : 0) * depth;
  if (dense && k + kUnit <= depth) {
    ptx::cp_async_16(to, row + k, n < rows);
  } else {
    *to = gather_unit<T>([&](int e) { return n < rows && k + e < depth ? row[k + e] : T{}; });
  }
}

// Block (x, y): pixels from x * kPixels, outputs from y * kOutputs.
template <class T, bool kSecond, class Traits>
__global__ void __launch_bounds__(Traits::kThreads) partial_mlp_mma_kernel(PartialMlpLayerParams layer) {
  constexpr int kPixels = Traits::kPixels, kOutputs = Traits::kOutputs, kColumns = Traits::kColumns;
  constexpr int kUnits = Traits::kUnits, kScore = kOutputs / 8;  // the tile with the score
  const PartialMlpParams& p = layer.mlp;
  const int depth = kSecond ? p.hidden : p.channels, outputs = kSecond ? p.channels : p.hidden;
  const T* weight = static_cast<const T*>(kSecond ? p.w2 : p.w1);
  const int64_t pixels = p.batch * p.height * p.width, first_pixel = int64_t(blockIdx.x) * kPixels;
  const int first_output = int(blockIdx.y) * kOutputs;
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const bool dense_weight = depth % kUnit == 0 && aligned_16(weight);
  uint4* stages = dynamic_smem<uint4>();

  const auto load = [&](int chunk) {
    uint4* rows = stages + chunk % 2 * Traits::kStage;
    uint4* columns = rows + kUnits * kPixels;
    for (int i = thread; i < kUnits * kPixels; i += Traits::kThreads) {
      const int u = i % kUnits, row = i / kUnits;
      load_input_unit<T, kSecond>(layer, first_pixel + row, first_pixel + row < pixels,
                                  chunk * Traits::kChunk + u * kUnit, rows + u * kPixels + row);
    }
    for (int i = thread; i < kUnits * kColumns; i += Traits::kThreads) {
      const int u = i % kUnits, n = i / kUnits, k = chunk * Traits::kChunk + u * kUnit;
      uint4* to = columns + u * kColumns + n;
      if (n < kOutputs) {
        load_weight_unit(weight, first_output + n, outputs, k, depth, dense_weight, to);
      } else {
        load_weight_unit(static_cast<const T*>(p.spatial_weight), n - kOutputs, 1, k, depth, false, to);
      }
    }
    ptx::cp_async_commit();
  };

  MmaTile<T, Traits::kRowTiles, kColumns / 8> sums;
  sums.set([&](int column) {
    const bool has = !kSecond && first_output + column < outputs;
    return has ? to_float(static_cast<const T*>(p.b1)[first_output + column]) : 0.0f;
  });
  const int chunks = (depth + Traits::kChunk - 1) / Traits::kChunk;
  load(0);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    if (chunk + 1 < chunks) {
      load(chunk + 1);
      ptx::cp_async_wait<1>();
    } else {
      ptx::cp_async_wait<0>();
    }
    __syncthreads();
    const uint4* rows = stages + chunk % 2 * Traits::kStage;
    const uint4* columns = rows + kUnits * kPixels;
#pragma unroll
    for (int s = 0; s < kUnits; s += 2) {
      const uint4* own[Traits::kRowTiles];
#pragma unroll
      for (int m = 0; m < Traits::kRowTiles; ++m) {
        own[m] = rows + s * kPixels + (warp * Traits::kRowTiles + m) * 16 + lane % 16;
      }
      sums.step(own, kPixels, columns + s * kColumns, kColumns, kColumns / 8);
    }
    __syncthreads();  // before the chunk after the next overwrites what others read here
  }

#pragma unroll
  for (int m = 0; m < Traits::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float scale = 1.0f;
      if constexpr (Traits::kGated) {
        // column 0 of the score's tile lies with the first of four lanes
        const float score = __shfl_sync(0xffffffffu, sums.d[m][kScore][half * 2], lane & ~3);
        scale =
            hardsigmoid(p.spatial_bias ? score + to_float(*static_cast<const T*>(p.spatial_bias)) : score);
      }
      const int64_t pixel = first_pixel + (warp * Traits::kRowTiles + m) * 16 + lane / 4 + half * 8;
      if (pixel >= pixels) continue;
      const int64_t x_at = kSecond ? pixel_offset(p, p.x_stride, pixel) : 0;
      const int64_t y_at = kSecond ? pixel_offset(p, p.y_stride, pixel) : pixel * layer.hidden_stride;
#pragma unroll
      for (int n = 0; n < kOutputs / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int output = first_output + n * 8 + lane % 4 * 2 + i;
          if (output >= outputs) continue;
          float value = sums.d[m][n][half * 2 + i];
          if constexpr (kSecond) {
            if (Traits::kGated && output < p.channels - p.channels / 2) value *= scale;
            value += to_float(static_cast<const T*>(p.b2)[output]);
            if (p.residual) value += to_float(static_cast<const T*>(p.x)[x_at + output * p.x_stride[1]]);
            static_cast<T*>(p.y)[y_at + output * p.y_stride[1]] = from_float<T>(value);
          } else {
            static_cast<T*>(layer.hidden)[y_at + output] = from_float<T>(activate(p.activation, value));
          }
        }
      }
    }
  }
}

}  // namespace tranche
