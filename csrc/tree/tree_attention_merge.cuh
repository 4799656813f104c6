// Joins the partial results of a row, in the order that tree_attention.cuh lays down, and writes the row out.
// A thread has four columns of a row; the maxima and sums it follows are the same for all threads of the row.
#pragma once

#include "tree/tree_attention.cuh"

namespace tranche {

template <bool kNatural_>
struct MergeTraits {
  static constexpr bool kNatural = kNatural_;
  static constexpr int kThreads = 128;
  static constexpr int kPrefetch = 8;  // partial results in flight: each is a trip to L2
  static constexpr int kVectors = 1, kRows = 1;
  static constexpr TRANCHE_HD int row_of(int, int) { return 0; }
};

template <class Traits>
class PartialMerger {
 public:
  using Part = State<Traits>;

  __device__ __forceinline__ PartialMerger(const TreeAttentionLaunch& plan, int b, int h, int row, int column)
      : plan_(plan), b_(b), h_(h), row_(row), column_(column) {
    quad_.clear();
    segment_.clear();
    total_.clear();
  }

  // Slots [slot, slot + count): spans first_span... of the level's size.
  __device__ __forceinline__ void add(int slot, int count, int level, int first_span) {
    constexpr int kPrefetch = Traits::kPrefetch;
    for (int begin = 0; begin < count; begin += kPrefetch) {
      Part parts[kPrefetch];
#pragma unroll
      for (int i = 0; i < kPrefetch; ++i) {
        if (begin + i < count) {
          load(slot + begin + i, parts[i]);
        } else {
          parts[i].clear();  // joining it changes nothing
        }
      }
#pragma unroll
      for (int i = 0; i < kPrefetch; ++i) {
        const int done = first_span + begin + i + 1;  // spans of the sequence up to here
        if (begin + i < count) append(parts[i], level, done);
      }
    }
  }

  // Continues where the first pass of exact stopped.
  __device__ __forceinline__ void resume(int level, int last_slot) {
    load(plan_.slots, quad_);
    if (level >= kSegmentLevel) load(plan_.slots + 1, segment_);
    if (level >= kSequenceLevel) load(last_slot, total_);
  }

  __device__ __forceinline__ const Part& finish() {
    close_quad();
    close_segment();
    return total_;
  }

 private:
  __device__ __forceinline__ void load(int slot, Part& part) const {
    const int64_t index = partial_row(plan_, b_, h_, slot, row_);
    const Float2 stats = *reinterpret_cast<const Float2*>(plan_.partial_stats + index * 2);
    const Float4 acc =
        *reinterpret_cast<const Float4*>(plan_.partial_out + index * plan_.p.head_dim + column_);
#pragma unroll
    for (int e = 0; e < 4; ++e) part.acc[0][e] = acc.v[e];
    part.m[0] = stats.x;
    part.l[0] = stats.y;
  }

  __device__ __forceinline__ void append(const Part& part, int level, int done) {
    if (level == kChunkLevel) {
      quad_.merge(part);
      if (done % kQuadChunks == 0) close_quad();
      if (done % kSegmentChunks == 0) close_segment();
    } else if (level == kQuadLevel) {
      segment_.merge(part);
      if (done % (kSegmentChunks / kQuadChunks) == 0) close_segment();
    } else {
      total_.merge(part);
    }
  }

  __device__ __forceinline__ void close_quad() {
    segment_.merge(quad_);
    quad_.clear();
  }

  __device__ __forceinline__ void close_segment() {
    total_.merge(segment_);
    segment_.clear();
  }

  const TreeAttentionLaunch& plan_;
  int b_, h_, row_, column_;
  Part quad_, segment_, total_;
};

template <class T>
__global__ void __launch_bounds__(MergeTraits<false>::kThreads)
    tree_attention_merge(const __grid_constant__ TreeAttentionLaunch plan) {
  using Traits = MergeTraits<sizeof(T) == 4>;
  const TreeAttentionParams& p = plan.p;
  const int b = int(blockIdx.z), h = int(blockIdx.y);
  const Sequence sequence(plan, b);
  if (sequence.direct) return;
  const int threads_per_row = p.head_dim / 4;
  const int64_t index = int64_t(blockIdx.x) * Traits::kThreads + threadIdx.x;
  if (index >= int64_t(plan.rows) * threads_per_row) return;
  const int row = int(index / threads_per_row), column = int(index % threads_per_row) * 4;
  const int node = row / plan.group;
  T* out = out_row<T>(plan, b, h, row) + column;

  PartialMerger<Traits> merger(plan, b, h, row, column);
  if (node < sequence.nodes) {
    const bool open = sequence.open(plan);
    merger.add(0, sequence.spans - (open ? 1 : 0), sequence.level, sequence.first_span);
    if (open) merger.resume(sequence.level, sequence.spans - 1);
    if (p.exact) {
      const int end =
          sequence.length + path_length(p.ancestors + (int64_t(b) * p.nodes + node) * p.words, node);
      const int low = p.window > 0 && p.window <= end ? int(end - p.window) : 0;
      const int tail = sequence.length / kChunkSlots;
      const int first = max(tail, low / kChunkSlots);
      merger.add(plan.slots + 2 + first - tail, (end + kChunkSlots - 1) / kChunkSlots - first, kChunkLevel,
                 first);
    }
  }
  const State<Traits>& total = merger.finish();
  const auto end = finish_row<Traits::kNatural>(plan, b, h, row, total.m[0], total.l[0], column == 0);
#pragma unroll
  for (int e = 0; e < 4; e += 2) store_pair<T>(plan, out + e, end(total.acc[0][e]), end(total.acc[0][e + 1]));
}

}  // namespace tranche
