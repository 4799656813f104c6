#include "pconv/partial_conv2d.cuh"

namespace tranche::cuda {
namespace {

using Traits = PartialConv2dTraits;

size_t element_size(DType type) { return type == DType::f32 ? 4 : 2; }

unsigned blocks_for(int64_t items, int64_t per_block) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  if (blocks > INT32_MAX) throw std::runtime_error("tranche: partial_conv2d: more than 2^31 - 1 blocks");
  return unsigned(blocks);
}

template <class T>
void copy_channels(const CopyChannelsParams& p, void* stream) {
  const int64_t kept = int64_t(p.channels) - (p.skip_end - p.skip);
  const unsigned blocks = blocks_for(p.batch * p.height * p.width * kept, Traits::kThreads);
  launch("copy_channels", copy_channels_kernel<T>, {dim3(blocks), dim3(Traits::kThreads)}, stream, p);
}

// The strides of a dense [B, H, W, C], in the order B, C, H, W.
void set_dense(int64_t (&strides)[4], const PartialConv2dParams& p) {
  strides[0] = p.out_height * p.out_width * p.c_out;
  strides[1] = 1;
  strides[2] = p.out_width * p.c_out;
  strides[3] = p.c_out;
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
  if (depthwise) {
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
  if (!p.in_place) return 0;
  return size_t(p.batch) * size_t(p.out_height * p.out_width * p.c_out) * element_size(p.type);
}

void partial_conv2d(const PartialConv2dParams& p, void* stream) {
  switch (p.type) {
    case DType::f32:
      return run<float>(p, stream);
    case DType::f16:
      return run<half>(p, stream);
    case DType::bf16:
      return run<bf16>(p, stream);
    default:
      throw std::runtime_error("tranche: partial_conv2d: expected f32, f16 or bf16");
  }
}

}  // namespace tranche::cuda
