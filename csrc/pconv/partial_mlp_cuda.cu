#include "pconv/partial_mlp_fused.cuh"

#include "core/dispatch.h"

namespace tranche::cuda {
namespace {

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Parts of the workspace, in bytes: the convolution's results, the hidden ones, the convolution's own.
struct Space {
  int64_t convolved_stride, hidden_stride;  // elements, whole units of 16 bytes
  int64_t hidden, conv, bytes;

  explicit Space(const PartialMlpParams& p) {
    const int64_t pixels = p.batch * p.height * p.width, size = p.type == DType::f32 ? 4 : 2;
    convolved_stride = round_up(p.convolved, kUnit);
    hidden_stride = round_up(p.hidden, kUnit);
    hidden = round_up(pixels * convolved_stride * size, 256);
    conv = hidden + round_up(pixels * hidden_stride * size, 256);
    bytes = conv + int64_t(partial_conv2d_workspace(convolution_of(p)));
  }
};

template <class T, bool kSecond>
void run_layer(const PartialMlpLayerParams& layer, void* stream) {
  const PartialMlpParams& p = layer.mlp;
  const int64_t pixels = p.batch * p.height * p.width, outputs = kSecond ? p.channels : p.hidden;
  const char* name = kSecond ? "partial_mlp_second" : "partial_mlp_first";
  const auto shape = [&](int block_pixels, int block_outputs, int threads, size_t shared) {
    const int64_t blocks = (pixels + block_pixels - 1) / block_pixels;
    if (blocks > INT32_MAX) throw std::runtime_error("tranche: partial_mlp: more than 2^31 - 1 blocks");
    const unsigned tiles = unsigned((outputs + block_outputs - 1) / block_outputs);
    return LaunchShape{dim3(unsigned(blocks), tiles), dim3(unsigned(threads)), shared};
  };
  if constexpr (sizeof(T) == 2) {
    const auto with = [&](auto traits) {
      using Traits = decltype(traits);
      launch(name, partial_mlp_mma_kernel<T, kSecond, Traits>,
             shape(Traits::kPixels, Traits::kOutputs, Traits::kThreads, 2 * Traits::kStage * sizeof(uint4)),
             stream, layer);
    };
    if constexpr (kSecond) {
      if (p.spatial_weight != nullptr) return with(PartialMlpMmaTraits<true>());
    }
    with(PartialMlpMmaTraits<false>());
  } else {
    using Traits = PartialMlpTraits;
    launch(name, partial_mlp_layer_kernel<T, kSecond>,
           shape(Traits::kPixels, Traits::kOutputs, Traits::kThreads, 0), stream, layer);
  }
}

// One launch where all of a pixel fits into a block, by the widths and the type alone.
bool is_fused(const PartialMlpParams& p) {
  return p.type != DType::f32 && p.channels <= 128 &&
         p.convolved <= PartialMlpFusedTraits<64, false>::kConvolved;
}

template <class T, class Traits>
void run_fused(const PartialMlpParams& mlp, void* stream) {
  PartialMlpFusedParams p{};
  p.mlp = mlp;
  p.conv = convolution_of(mlp);
  p.units = int32_t(round_up(mlp.channels, 16) / kUnit);
  p.conv_chunks = int32_t(round_up(mlp.convolved, 16) / 16);
  p.chunks = (mlp.hidden + Traits::kHidden - 1) / Traits::kHidden;
  p.tiles_x = (mlp.width + Traits::kWidth - 1) / Traits::kWidth;
  p.tiles_y = (mlp.height + Traits::kHeight - 1) / Traits::kHeight;
  const auto even = [&](const void* data, const int64_t (&stride)[4], int64_t to) {
    return stride[1] == 1 && stride[0] % to == 0 && stride[2] % to == 0 && stride[3] % to == 0 &&
           reinterpret_cast<uintptr_t>(data) % (2 * to) == 0;
  };
  p.dense = even(mlp.x, mlp.x_stride, kUnit);
  p.pairs = even(mlp.x, mlp.x_stride, 2) && even(mlp.y, mlp.y_stride, 2);

  // The weights stay if they fit; elsewhere their chunks pass by, one in use and one on its way.
  const DeviceLimits limits = device_limits();
  p.slots = p.chunks;
  if (p.template shared_bytes<Traits>() > limits.shared) p.slots = 2;
  const size_t shared = p.template shared_bytes<Traits>();
  const int64_t tiles = mlp.batch * p.tiles_y * p.tiles_x, kept = int64_t(limits.shared / (shared + 1024));
  const int64_t blocks = limits.processors * (kept < 1 ? 1 : kept);
  launch("partial_mlp_fused", partial_mlp_fused_kernel<T, Traits>,
         {dim3(unsigned(tiles < blocks ? tiles : blocks)), dim3(Traits::kThreads), shared}, stream, p);
}

template <class T>
void run_fused(const PartialMlpParams& p, void* stream) {
  if (p.spatial_weight == nullptr) {
    p.channels <= 64 ? run_fused<T, PartialMlpFusedTraits<64, false>>(p, stream)
                     : run_fused<T, PartialMlpFusedTraits<128, false>>(p, stream);
  } else {
    p.channels <= 64 ? run_fused<T, PartialMlpFusedTraits<64, true>>(p, stream)
                     : run_fused<T, PartialMlpFusedTraits<128, true>>(p, stream);
  }
}

template <class T>
void run(const PartialMlpParams& p, void* stream) {
  if constexpr (sizeof(T) == 2) {
    if (is_fused(p)) return run_fused<T>(p, stream);
  }
  const Space space(p);
  char* workspace = static_cast<char*>(p.workspace);
  PartialMlpLayerParams layer{};
  layer.mlp = p;
  layer.convolved = workspace;
  layer.hidden = workspace + space.hidden;
  layer.convolved_stride = space.convolved_stride;
  layer.hidden_stride = space.hidden_stride;
  layer.dense = p.x_stride[1] == 1 && p.x_stride[0] % kUnit == 0 && p.x_stride[2] % kUnit == 0 &&
                p.x_stride[3] % kUnit == 0 && reinterpret_cast<uintptr_t>(p.x) % 16 == 0;

  PartialConv2dParams conv = convolution_of(p);
  conv.y = workspace;
  conv.workspace = workspace + space.conv;
  conv.y_stride[1] = 1;
  conv.y_stride[3] = space.convolved_stride;
  conv.y_stride[2] = p.width * conv.y_stride[3];
  conv.y_stride[0] = p.height * conv.y_stride[2];
  partial_conv2d(conv, stream);
  run_layer<T, false>(layer, stream);
  run_layer<T, true>(layer, stream);
}

}  // namespace

size_t partial_mlp_workspace(const PartialMlpParams& p) { return is_fused(p) ? 0 : size_t(Space(p).bytes); }

void partial_mlp(const PartialMlpParams& p, void* stream) {
  with_type<float, half, bf16>("partial_mlp", p.type, [&](auto t) { run<decltype(t)>(p, stream); });
}

}  // namespace tranche::cuda
