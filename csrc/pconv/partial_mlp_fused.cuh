// partial_mlp as one launch, for 16-bit types and at most 128 channels. A block stays on its processor and
// takes tiles of 8 x 16 pixels: it convolves their first channels into shared memory, beside the others as
// they come from x; then, 32 hidden channels at a time, a warp multiplies its pixels by w1 and, from
// registers, by w2. Both weights lie in shared memory for good, or where they do not fit pass through it
// chunk by chunk. Sums are the chains that partial_conv2d_mma.cuh and partial_mlp_mma.cuh have.
#pragma once

#include "pconv/partial_conv2d_mma.cuh"
#include "pconv/partial_mlp_mma.cuh"

namespace tranche {

template <int kColumns_, bool kGated_>
struct PartialMlpFusedTraits {
  static constexpr int kColumns = kColumns_;  // channels, at most
  static constexpr bool kGated = kGated_;     // the score is one more column of the second layer
  // Sums of the second layer fill 64 registers either way.
  static constexpr int kRowTiles = kColumns <= 64 ? 2 : 1;  // rows of pixels of a warp
  static constexpr int kHeight = 8, kWidth = 16, kPixels = kHeight * kWidth;
  static constexpr int kThreads = 32 * kHeight / kRowTiles;
  static constexpr int kHidden = 32;     // of a chunk
  static constexpr int kConvolved = 32;  // channels, at most
  static constexpr int kTaps = 9, kHaloRows = kHeight + 2, kHaloColumns = kWidth + 2;
  static constexpr int kArea = kHaloRows * kHaloColumns;
  static constexpr int kConvChunk = kTaps * 2 * kConvolved;  // units of 16 input channels' weights
};

struct PartialMlpFusedParams {
  PartialMlpParams mlp;
  PartialConv2dParams conv;
  int64_t tiles_x, tiles_y;
  int32_t units;        // of a pixel's channels, an even number
  int32_t conv_chunks;  // of 16 channels
  int32_t chunks;       // of hidden channels
  int32_t slots;        // of chunks of weights in shared memory: all, or two
  bool dense;           // units of x are 16 aligned bytes
  bool pairs;           // pairs of channels of x and of y are 4 aligned bytes

  // Units of a chunk: w1 [units][kHidden], w2 [kHidden / 8][channels], the spatial weight [kHidden / 8][16].
  template <class Traits>
  TRANCHE_HD int chunk_units() const {
    return units * Traits::kHidden + Traits::kHidden / 8 * (8 * units + (Traits::kGated ? 16 : 0));
  }
  template <class Traits>
  TRANCHE_HD size_t shared_bytes() const {
    return 16 * (size_t(slots) * size_t(chunk_units<Traits>()) + size_t(conv_chunks * Traits::kConvChunk) +
                 size_t(2 * Traits::kArea + units * Traits::kPixels));
  }
};

// The convolution's weights as [chunks][taps][2][kConvolved][8].
template <class T, class Traits>
__device__ __forceinline__ void load_conv_weights(const PartialMlpFusedParams& p, uint4* to) {
  const int c = p.mlp.convolved;
  const T* weight = static_cast<const T*>(p.mlp.conv_weight);
  for (int i = int(threadIdx.x); i < p.conv_chunks * Traits::kConvChunk; i += Traits::kThreads) {
    const int n = i % Traits::kConvolved, half = i / Traits::kConvolved % 2;
    const int tap = i / (2 * Traits::kConvolved) % Traits::kTaps, chunk = i / Traits::kConvChunk;
    const int channel = chunk * 16 + half * kUnit;
    to[i] = gather_unit<T>([&](int e) {
      return n < c && channel + e < c ? weight[(n * c + channel + e) * Traits::kTaps + tap] : T{};
    });
  }
}

template <class T, class Traits>
__device__ __forceinline__ void load_mlp_chunk(const PartialMlpFusedParams& p, int chunk, uint4* to) {
  constexpr int kHidden = Traits::kHidden;
  const PartialMlpParams& mlp = p.mlp;
  const T *w1 = static_cast<const T*>(mlp.w1), *w2 = static_cast<const T*>(mlp.w2);
  const T* spatial = static_cast<const T*>(mlp.spatial_weight);
  const bool dense1 = mlp.channels % kUnit == 0 && aligned_16(w1);
  const bool dense2 = mlp.hidden % kUnit == 0 && aligned_16(w2);
  const int first = chunk * kHidden, columns = 8 * p.units;
  for (int i = int(threadIdx.x); i < p.units * kHidden; i += Traits::kThreads) {
    const int u = i % p.units, n = i / p.units;  // neighbouring threads read neighbouring addresses
    load_weight_unit(w1, first + n, mlp.hidden, u * kUnit, mlp.channels, dense1, to + u * kHidden + n);
  }
  to += p.units * kHidden;
  for (int i = int(threadIdx.x); i < kHidden / 8 * columns; i += Traits::kThreads) {
    const int u = i % (kHidden / 8), n = i / (kHidden / 8);
    load_weight_unit(w2, n, mlp.channels, first + u * kUnit, mlp.hidden, dense2, to + u * columns + n);
  }
  if constexpr (Traits::kGated) {
    to += kHidden / 8 * columns;
    for (int i = int(threadIdx.x); i < kHidden / 8 * 16; i += Traits::kThreads) {
      load_weight_unit(spatial, i % 16, 1, first + i / 16 * kUnit, mlp.hidden, false, to + i);
    }
  }
}

// The channels from `convolved` on of a tile's pixels, zeros beyond the last: u is [units][kPixels][8].
template <class T, class Traits>
__device__ __forceinline__ void load_untouched(const PartialMlpFusedParams& p, int64_t b, int64_t top,
                                               int64_t left, uint4* u) {
  constexpr int kPixels = Traits::kPixels;
  const PartialMlpParams& mlp = p.mlp;
  const T* x = static_cast<const T*>(mlp.x) + b * mlp.x_stride[0];
  const T* gate = static_cast<const T*>(mlp.gate);
  if (gate != nullptr) gate += b * (mlp.channels - mlp.convolved);
  const int first = mlp.convolved / kUnit, begin = first / 2 * 2;
  // Neighbouring threads read neighbouring addresses: 32 bytes of a pixel, or pixels.
  const bool channels_last = mlp.x_stride[1] == 1;
  for (int i = int(threadIdx.x); i < (p.units - begin) * kPixels; i += Traits::kThreads) {
    const int pixel = channels_last ? i / 2 % kPixels : i % kPixels;
    const int unit = begin + (channels_last ? i / (2 * kPixels) * 2 + i % 2 : i / kPixels);
    if (unit < first) continue;
    const int64_t row = top + pixel / Traits::kWidth, column = left + pixel % Traits::kWidth;
    const bool inside = row < mlp.height && column < mlp.width;
    const T* from = x + (inside ? row * mlp.x_stride[2] + column * mlp.x_stride[3] : 0);
    uint4* to = u + unit * kPixels + pixel;
    const int k = unit * kUnit;
    if (p.dense && gate == nullptr && k >= mlp.convolved && k + kUnit <= mlp.channels) {
      ptx::cp_async_16(to, from + k, inside);
      continue;
    }
    const auto element = [&](int e) {
      if (!inside || k + e < mlp.convolved || k + e >= mlp.channels) return T{};
      const T value = from[(k + e) * mlp.x_stride[1]];
      if (gate == nullptr) return value;
      return from_float<T>(to_float(value) * to_float(gate[k + e - mlp.convolved]));
    };
    if (k >= mlp.convolved) {
      *to = gather_unit<T>(element);
    } else {  // the convolution writes the others of this unit
      for (int e = mlp.convolved - k; e < kUnit; ++e) reinterpret_cast<T*>(to)[e] = element(e);
    }
  }
}

// Two channels of y from their sums, which are done but for b2 and the residual.
template <class T>
__device__ __forceinline__ void store_mlp_outputs(const PartialMlpFusedParams& p, int64_t x_at, int64_t y_at,
                                                  int output, float (&value)[2]) {
  const PartialMlpParams& mlp = p.mlp;
  const T *x = static_cast<const T*>(mlp.x) + x_at, *b2 = static_cast<const T*>(mlp.b2);
  T* y = static_cast<T*>(mlp.y) + y_at;
  if (p.pairs && output + 2 <= mlp.channels) {
    uint32_t residual = 0;
    if (mlp.residual) residual = *reinterpret_cast<const uint32_t*>(x + output);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      value[i] += to_float(b2[output + i]);
      if (mlp.residual) value[i] += to_float(T{uint16_t(residual >> 16 * i)});
    }
    *reinterpret_cast<uint32_t*>(y + output) = ptx::pack<T>(value[0], value[1]);
    return;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (output + i >= mlp.channels) break;
    value[i] += to_float(b2[output + i]);
    if (mlp.residual) value[i] += to_float(x[(output + i) * mlp.x_stride[1]]);
    y[(output + i) * mlp.y_stride[1]] = from_float<T>(value[i]);
  }
}

template <class T, class Traits>
__global__ void __launch_bounds__(Traits::kThreads) partial_mlp_fused_kernel(PartialMlpFusedParams p) {
  constexpr int kRowTiles = Traits::kRowTiles, kPixels = Traits::kPixels, kHidden = Traits::kHidden;
  constexpr int kArea = Traits::kArea;
  const PartialMlpParams& mlp = p.mlp;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int chunk_units = p.chunk_units<Traits>(), columns = 8 * p.units;
  const bool stays = p.slots == p.chunks;
  uint4* weights = dynamic_smem<uint4>();
  uint4* conv_weights = weights + p.slots * chunk_units;
  uint4* halo = conv_weights + p.conv_chunks * Traits::kConvChunk;
  uint4* u = halo + 2 * kArea;
  // This lane's rows of a half of u's first 16 channels, and of the halo.
  const int own = warp * kRowTiles * 16 + lane % 16;

  load_conv_weights<T, Traits>(p, conv_weights);
  if (stays) {
    for (int chunk = 0; chunk < p.chunks; ++chunk) {
      load_mlp_chunk<T, Traits>(p, chunk, weights + chunk * chunk_units);
    }
  }
  ptx::cp_async_commit();

  const int64_t tiles = mlp.batch * p.tiles_y * p.tiles_x;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t b = tile / (p.tiles_y * p.tiles_x);
    const int64_t top = tile / p.tiles_x % p.tiles_y * Traits::kHeight;
    const int64_t left = tile % p.tiles_x * Traits::kWidth;
    const T* x = static_cast<const T*>(mlp.x) + b * mlp.x_stride[0];
    const auto load_convolved = [&](int chunk) {
      load_halo<T, Traits::kThreads>(p.conv, x, chunk, top - 1, left - 1, Traits::kHaloRows,
                                     Traits::kHaloColumns, p.dense, halo);
      ptx::cp_async_commit();
    };
    load_convolved(0);
    load_untouched<T, Traits>(p, b, top, left, u);
    if (!stays) load_mlp_chunk<T, Traits>(p, 0, weights);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();

    MmaTile<T, kRowTiles, Traits::kConvolved / 8> convolved;
    convolved.set([](int) { return 0.0f; });
    for (int chunk = 0; chunk < p.conv_chunks; ++chunk) {
      __syncthreads();
      for (int tap = 0; tap < Traits::kTaps; ++tap) {
        const uint4* rows[kRowTiles];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          rows[m] = halo + (warp * kRowTiles + m + tap / 3) * Traits::kHaloColumns + lane % 16 + tap % 3;
        }
        convolved.step(rows, kArea, conv_weights + (chunk * Traits::kTaps + tap) * 2 * Traits::kConvolved,
                       Traits::kConvolved, (mlp.convolved + 7) / 8);
      }
      if (chunk + 1 == p.conv_chunks) break;
      __syncthreads();  // before the next chunk overwrites what others read here
      load_convolved(chunk + 1);
      ptx::cp_async_wait<0>();
    }
    convolved.each([&](int row, int column, float value) {
      if (column >= mlp.convolved) return;
      T* cell = reinterpret_cast<T*>(u + column / 8 * kPixels + warp * kRowTiles * 16 + row);
      cell[column % 8] = from_float<T>(value);
    });
    ptx::cp_async_wait<0>();
    __syncthreads();

    MmaTile<T, kRowTiles, Traits::kColumns / 8> sums;
    MmaTile<T, kRowTiles, 2> score;
    sums.set([](int) { return 0.0f; });
    score.set([](int) { return 0.0f; });
    for (int chunk = 0; chunk < p.chunks; ++chunk) {
      if (!stays && chunk + 1 < p.chunks) {
        load_mlp_chunk<T, Traits>(p, chunk + 1, weights + (chunk + 1) % 2 * chunk_units);
        ptx::cp_async_commit();
      }
      const uint4* w1 = weights + (stays ? chunk : chunk % 2) * chunk_units;
      const uint4* w2 = w1 + p.units * kHidden;
      MmaTile<T, kRowTiles, kHidden / 8> hidden;
      hidden.set([&](int column) {
        const int m = chunk * kHidden + column;
        return m < mlp.hidden ? to_float(static_cast<const T*>(mlp.b1)[m]) : 0.0f;
      });
      for (int k = 0; k < p.units; k += 2) {
        const uint4* rows[kRowTiles];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) rows[m] = u + k * kPixels + own + m * 16;
        hidden.step(rows, kPixels, w1 + k * kHidden, kHidden, kHidden / 8);
      }
      // A lane's sums of 16 columns are its part of 16 products of the next layer.
#pragma unroll
      for (int t = 0; t < kHidden / 16; ++t) {
        uint32_t h[kRowTiles][4];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float* pair = hidden.d[m][2 * t + i / 2] + i % 2 * 2;
            h[m][i] = ptx::pack<T>(activate(mlp.activation, pair[0]), activate(mlp.activation, pair[1]));
          }
        }
        sums.step(h, w2 + 2 * t * columns, columns, p.units);
        if constexpr (Traits::kGated) {
          score.step(h, w2 + kHidden / 8 * columns + 2 * t * 16, 16, 2);
        }
      }
      if (!stays) {
        ptx::cp_async_wait<0>();
        __syncthreads();  // the next chunk is there, and this one's place is free
      }
    }

#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float scale = 1.0f;
        if constexpr (Traits::kGated) {
          // column 0 lies with the first of four lanes
          const float own_score = __shfl_sync(0xffffffffu, score.d[m][0][half * 2], lane & ~3);
          scale = hardsigmoid(
              mlp.spatial_bias ? own_score + to_float(*static_cast<const T*>(mlp.spatial_bias)) : own_score);
        }
        const int64_t row = top + warp * kRowTiles + m, column = left + lane / 4 + half * 8;
        if (row >= mlp.height || column >= mlp.width) continue;
        const int64_t x_at = b * mlp.x_stride[0] + row * mlp.x_stride[2] + column * mlp.x_stride[3];
        const int64_t y_at = b * mlp.y_stride[0] + row * mlp.y_stride[2] + column * mlp.y_stride[3];
#pragma unroll
        for (int n = 0; n < Traits::kColumns / 8; ++n) {
          const int output = n * 8 + lane % 4 * 2;
          if (output >= mlp.channels) break;
          float value[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            value[i] = sums.d[m][n][half * 2 + i];
            if (Traits::kGated && output + i < mlp.channels - mlp.channels / 2) value[i] *= scale;
          }
          store_mlp_outputs<T>(p, x_at, y_at, output, value);
        }
      }
    }
    __syncthreads();  // before the next tile overwrites what others read here
  }
}

}  // namespace tranche
