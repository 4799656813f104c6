#include "tree/tree_attention_backward.cuh"

#include "core/dispatch.h"

namespace tranche::cuda {
namespace {

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// The workspace's parts; returns its size. Without memory it only counts.
size_t place(TreeAttentionBackwardLaunch& plan, char* memory) {
  const TreeAttentionParams& p = plan.b.forward;
  int64_t used = 0;
  const auto take = [&](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<decltype(&*pointer)>(memory + used);
    used += round_up(count * int64_t(sizeof(*pointer)), 256);
  };
  const int64_t rows = int64_t(p.batch) * p.nodes * p.heads_q;
  take(plan.rows, rows);
  take(plan.broken, rows);
  if (p.block_table != nullptr && plan.b.grad_k != nullptr) {
    const int64_t elements = int64_t(p.batch) * p.capacity * p.heads_kv * p.head_dim;
    take(plan.slot_k, elements);
    take(plan.slot_v, elements);
  }
  return size_t(used);
}

bool all_aligned(const TreeAttentionBackwardParams& b, int bytes) {
  const TreeAttentionParams& p = b.forward;
  const int element = p.q_type == DType::f32 ? 4 : 2;
  uint64_t odd = reinterpret_cast<uintptr_t>(p.q) | reinterpret_cast<uintptr_t>(p.k_cache) |
                 reinterpret_cast<uintptr_t>(p.v_cache) | reinterpret_cast<uintptr_t>(b.grad_out);
  for (int i = 0; i < 3; ++i)
    odd |= uint64_t(p.q_stride[i] | p.k_stride[i] | p.v_stride[i]) * uint64_t(element);
  return odd % uint64_t(bytes) == 0;
}

unsigned blocks(int64_t count) {
  if (count > INT32_MAX) {
    throw std::runtime_error("tranche: tree_attention_backward: the launch needs 2^31 or more blocks");
  }
  return unsigned(count);
}

template <class T, int kDim>
void run(TreeAttentionBackwardLaunch& plan, void* stream) {
  using Traits = BackwardTraits<T, kDim>;
  const TreeAttentionParams& p = plan.b.forward;
  const int64_t rows = int64_t(p.batch) * p.nodes * p.heads_q, pairs = int64_t(p.batch) * p.heads_kv;
  plan.row_tiles = (plan.rows_per_head + Traits::kTile - 1) / Traits::kTile;
  plan.key_tiles = int32_t((int64_t(p.capacity) + Traits::kTile - 1) / Traits::kTile);
  const dim3 threads(Traits::kThreads), few(kBackwardThreads);

  const int64_t row_blocks = (rows + kBackwardThreads / 32 - 1) / (kBackwardThreads / 32);
  launch("tree_attention_prepare", tree_attention_prepare_kernel<T>, {dim3(blocks(row_blocks)), few}, stream,
         plan);
  const dim3 by_rows(blocks(pairs * plan.row_tiles)), by_slots(blocks(pairs * plan.key_tiles));
  if constexpr (sizeof(T) == 4) {
    launch("tree_attention_sums", tree_attention_sums_kernel<Traits>, {by_rows, threads, Traits::kSmem},
           stream, plan);
  }
  if (plan.b.grad_q != nullptr) {
    launch("tree_attention_grad_query", tree_attention_grad_query_kernel<T, Traits>,
           {by_rows, threads, Traits::kSmem}, stream, plan);
  }
  if (plan.b.grad_k == nullptr) return;
  launch("tree_attention_grad_cache", tree_attention_grad_cache_kernel<T, Traits>,
         {by_slots, threads, Traits::kSmem}, stream, plan);
  if (plan.slot_k != nullptr) {
    const dim3 by_pages(blocks(int64_t(p.num_pages) * p.heads_kv));
    launch("tree_attention_pages", tree_attention_pages_kernel<T>, {by_pages, few}, stream, plan);
  }
}

template <class T>
void run(TreeAttentionBackwardLaunch& plan, void* stream) {
  const int dim = plan.b.forward.head_dim;
  if (dim <= 64) return run<T, 64>(plan, stream);
  if (dim <= 128) return run<T, 128>(plan, stream);
  if (dim <= 256) return run<T, 256>(plan, stream);
  throw std::runtime_error("tranche: tree_attention_backward: head sizes up to 256, got " +
                           std::to_string(dim));
}

}  // namespace

size_t tree_attention_backward_workspace(const TreeAttentionBackwardParams& params) {
  TreeAttentionBackwardLaunch plan{};
  plan.b = params;
  return place(plan, nullptr);
}

void tree_attention_backward(const TreeAttentionBackwardParams& params, void* stream) {
  const TreeAttentionParams& p = params.forward;
  TreeAttentionBackwardLaunch plan{};
  plan.b = params;
  place(plan, static_cast<char*>(params.workspace));
  plan.group = p.heads_q / p.heads_kv;
  plan.rows_per_head = p.nodes * plan.group;
  plan.aligned = all_aligned(params, p.q_type == DType::f32 ? 16 : 8);
  with_type<float, half, bf16>("tree_attention_backward", p.q_type,
                               [&](auto t) { run<decltype(t)>(plan, stream); });
}

}  // namespace tranche::cuda
