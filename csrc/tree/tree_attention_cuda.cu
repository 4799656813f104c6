// Plans and launches tree_attention: which variant, how many blocks, where partial results go.
#include <cstdlib>

#include "core/dispatch.h"
#include "tree/tree_attention_merge.cuh"
#include "tree/tree_attention_variants.h"

namespace tranche::cuda {
namespace {

using Variant = TreeAttentionVariant;

// Two blocks for each of an H200's 132 streaming multiprocessors. More splits than that only add partial
// results. TRANCHE_TREE_ATTENTION_BLOCKS is for tests, which reach every level of spans with it by short
// caches: the bits are the same whatever it says.
int64_t busy_blocks() {
  const char* blocks = std::getenv("TRANCHE_TREE_ATTENTION_BLOCKS");
  return blocks == nullptr ? 264 : std::atoll(blocks);
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr size_t align_256(size_t bytes) { return (bytes + 255) / 256 * 256; }

Variant choose(const TreeAttentionParams& p, int64_t rows) {
  return with_type<float, half, bf16>("tree_attention", p.q_type, [&](auto t) {
    return tree_attention_variant<decltype(t)>(p.head_dim, rows);
  });
}

bool aligned(const void* pointer, const int64_t (&strides)[3], int64_t element, int64_t bytes) {
  bool result = reinterpret_cast<uintptr_t>(pointer) % uintptr_t(bytes) == 0;
  for (const int64_t stride : strides) result = result && stride * element % bytes == 0;
  return result;
}

int64_t element_bytes(DType type) { return type == DType::f32 ? 4 : type == DType::e4m3 ? 1 : 2; }

struct Plan {
  TreeAttentionLaunch launch;
  Variant variant;
  bool merge;         // partial results are possible
  bool keep_segment;  // a block may own more than a quad
  size_t out_bytes, stats_bytes, running_bytes;
};

Plan make_plan(const TreeAttentionParams& p) {
  Plan plan{};
  TreeAttentionLaunch& l = plan.launch;
  l.p = p;
  // A single node is its own path, and its slot is its position.
  l.p.exact = p.exact && p.nodes > 1;
  if (p.num_pages == 0) l.p.capacity = 0;  // a block table without pages holds nothing
  // Natural for float32, to base 2 otherwise: see ScoreMap.
  const bool natural = p.q_type == DType::f32;
  const double base_2 = p.scale_f64 * 1.4426950408889634;
  if (p.softcap > 0) {
    l.score_factor = float((natural ? p.scale_f64 : 2.0 * base_2) / p.softcap);
  } else {
    l.score_factor = float(natural ? p.scale_f64 : base_2);
  }
  l.group = p.heads_q / p.heads_kv;
  l.rows = p.nodes * l.group;
  plan.variant = choose(p, l.rows);
  l.row_blocks = int32_t(ceil_div(l.rows, plan.variant.rows));
  const int64_t chunks = ceil_div(l.p.capacity, kChunkSlots);
  const int64_t busy = busy_blocks() / (int64_t(p.batch) * p.heads_kv * l.row_blocks);
  l.splits = int32_t(busy < 1 || chunks < 1 ? 1 : busy < chunks ? busy : chunks);
  const int64_t segments = ceil_div(chunks, kSegmentChunks);
  l.slots = int32_t(l.splits == 1 ? 1 : segments > l.splits ? segments : l.splits);
  // An open quad, an open segment, and the chunks from the one where the committed tokens end: they end in
  // any of its slots, and a path is N at most.
  l.all_slots = l.slots + (l.p.exact ? int32_t(2 + (p.nodes + kChunkSlots - 2) / kChunkSlots + 1) : 0);
  l.aligned_kv = aligned(p.k_cache, p.k_stride, element_bytes(p.kv_type), 16) &&
                 aligned(p.v_cache, p.v_stride, element_bytes(p.kv_type), 16);
  l.aligned_q = aligned(p.q, p.q_stride, element_bytes(p.q_type), 16);
  l.aligned_out = aligned(p.out, p.out_stride, element_bytes(p.q_type), 4);

  plan.merge = l.splits > 1 || l.p.exact;
  plan.keep_segment = chunks > int64_t(kQuadChunks) * l.splits;
  const size_t partial_rows = plan.merge ? size_t(p.batch) * p.heads_kv * l.all_slots * l.rows : 0;
  plan.out_bytes = align_256(partial_rows * p.head_dim * sizeof(float));
  plan.stats_bytes = align_256(partial_rows * 2 * sizeof(float));
  const size_t blocks = size_t(p.batch) * p.heads_kv * l.row_blocks * l.splits;
  plan.running_bytes = plan.keep_segment ? blocks * 2 * plan.variant.stored_bytes : 0;
  return plan;
}

template <class T>
void launch_merge(const TreeAttentionLaunch& l, void* stream) {
  const int64_t threads = int64_t(l.rows) * (l.p.head_dim / 4);
  const dim3 grid(unsigned(ceil_div(threads, MergeTraits<false>::kThreads)), unsigned(l.p.heads_kv),
                  unsigned(l.p.batch));
  launch("tree_attention_merge", tree_attention_merge<T>, {grid, dim3(MergeTraits<false>::kThreads)}, stream,
         l);
}

}  // namespace

size_t tree_attention_workspace(const TreeAttentionParams& p) {
  if (p.batch == 0 || p.nodes == 0 || p.heads_q == 0) return 0;
  const Plan plan = make_plan(p);
  return plan.out_bytes + plan.stats_bytes + plan.running_bytes;
}

void tree_attention(const TreeAttentionParams& p, void* stream) {
  if (p.batch == 0 || p.nodes == 0 || p.heads_q == 0) return;
  Plan plan = make_plan(p);
  TreeAttentionLaunch& l = plan.launch;
  unsigned char* workspace = static_cast<unsigned char*>(p.workspace);
  l.partial_out = reinterpret_cast<float*>(workspace);
  l.partial_stats = reinterpret_cast<float*>(workspace + plan.out_bytes);
  l.running = reinterpret_cast<float*>(workspace + plan.out_bytes + plan.stats_bytes);

  const Variant& v = plan.variant;
  const dim3 grid(unsigned(l.row_blocks) * unsigned(l.splits), unsigned(p.heads_kv), unsigned(p.batch));
  launch(v.name, v.kernel, {grid, dim3(unsigned(v.threads)), size_t(v.smem)}, stream, l);

  if (l.p.exact) {
    const Variant path = choose(p, 1);
    TreeAttentionLaunch paths = l;
    paths.paths = true;
    paths.row_blocks = int32_t(p.nodes * ceil_div(l.group, path.rows));
    const dim3 path_grid(unsigned(paths.row_blocks), unsigned(p.heads_kv), unsigned(p.batch));
    launch(path.name, path.paths, {path_grid, dim3(unsigned(path.threads)), size_t(path.smem)}, stream,
           paths);
  }
  if (plan.merge) {
    with_type<float, half, bf16>("tree_attention", p.q_type,
                                 [&](auto t) { launch_merge<decltype(t)>(l, stream); });
  }
}

}  // namespace tranche::cuda
