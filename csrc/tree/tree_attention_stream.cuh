// How a block walks its keys: which spans it takes, the ring of tiles in shared memory that cp.async fills ahead
// of the arithmetic, and where partial results go. The arithmetic is an Engine (tree_attention_mma.cuh,
// tree_attention_ffma.cuh):
//
//   Engine::Traits         kThreads, kBlockRows, kTile, kStages, kStageBytes, kScratchBytes and the Layout of State
//   Engine(block, smem)    loads the block's rows of q; smem: kScratchBytes of shared memory
//   copy(stage, offsets)   starts the copy of a tile whose rows are at these offsets (of k and v, in elements; < 0: zeros)
//   begin_chunk(), tile<kMasked>(stage, first), end_chunk()    a fresh state, in `chunk`
//   row(i), column(v)      what acc[v] and m[i], l[i] are of
//   writes_stats()         whether this thread is the one of its row to write m, l and lse
#pragma once

#include "tree/tree_attention.cuh"

namespace tranche {

// Shared memory after the ring: byte offsets.
template <class Traits>
struct StreamMemory {
  static constexpr int kOffsets = Traits::kStages * Traits::kStageBytes;
  static constexpr int kPath = kOffsets + Traits::kStages * Traits::kTile * 2 * int(sizeof(int64_t));
  static constexpr int kScratch = kPath + kMaxNodes * int(sizeof(int16_t));
  static constexpr int kSegment = (kScratch + Traits::kScratchBytes + 15) / 16 * 16;
  static constexpr int kBytes = kSegment;  // if no segment is kept
  static constexpr int kBytesWithSegment =
      kSegment + (Traits::kSegmentInShared ? StoredState<Traits>::kBytes : 0);
  static_assert(kOffsets % 16 == 0 && kScratch % 16 == 0);
  static_assert(kBytesWithSegment <= 163 * 1024, "shared memory of a block on sm_80");
};

// What a block is about.
struct Block {
  const TreeAttentionLaunch& plan;
  const Sequence& sequence;
  Keys keys;
  int b, h;
  int first_row, end_row;  // packed rows
  int path_node;           // the node whose path is walked, or -1
  const int16_t* path;     // shared: its nodes in order

  __device__ __forceinline__ bool in_use(int row) const {
    return row < end_row && row / plan.group < sequence.nodes;
  }

  __device__ __forceinline__ Row row(int packed) const {
    const int node = packed / plan.group;
    if (!in_use(packed)) return {nullptr, 0, 0};
    const int64_t index = int64_t(b) * plan.p.nodes + node;
    return {plan.p.ancestors + index * plan.p.words, node, plan.p.depth[index]};
  }

  // Page (or sequence) and slot in it of a key; the page is clamped into the cache.
  __device__ __forceinline__ void locate(int position, int64_t& page, int64_t& within) const {
    const TreeAttentionParams& p = plan.p;
    int slot = position;
    if (path_node >= 0 && position >= sequence.length) {
      slot = sequence.length + path[position - sequence.length];
    }
    page = b;
    within = slot;
    if (p.block_table != nullptr) {
      const int column = slot / p.page_size;
      within = slot - column * p.page_size;
      page = clamp_int(p.block_table[b * p.block_table_stride + column], 0, p.num_pages - 1);
    }
  }
};

// Position t of 0, 1, ... of the path of a node: its ancestors in order of index, which is the order of depth.
template <int kThreads>
__device__ __forceinline__ void list_path(const int64_t* ancestors, int node, int16_t* path) {
  for (int j = int(threadIdx.x); j <= node; j += kThreads) {
    if (((uint64_t(ancestors[j / 64]) >> (j % 64)) & 1) == 0) continue;
    int rank = __popcll(uint64_t(ancestors[j / 64]) & low_bits(j % 64));
    for (int w = 0; w < j / 64; ++w) rank += __popcll(uint64_t(ancestors[w]));
    path[rank] = int16_t(j);
  }
}

template <class Engine>
class Stream {
  using Traits = typename Engine::Traits;
  using Memory = StreamMemory<Traits>;
  static constexpr int kTile = Traits::kTile;
  static constexpr int kStages = Traits::kStages;
  static constexpr int kThreads = Traits::kThreads;
  static_assert(kChunkSlots % kTile == 0 && kTile <= 64, "a tile's mask is one word");
  static_assert(kThreads >= kTile, "a thread looks up one row of a tile");

 public:
  __device__ __forceinline__ Stream(const Block& block, unsigned char* smem)
      : block_(block),
        smem_(smem),
        engine_(block, smem + Memory::kScratch) {
    constexpr int kStored = StoredState<Traits>::kBytes / int(sizeof(Float4));
    const int64_t index = (int64_t(block.b) * block.plan.p.heads_kv + block.h) * gridDim.x + blockIdx.x;
    Float4* own = reinterpret_cast<Float4*>(block.plan.running) + index * 2 * kStored;
    running_.base = own;
    segment_.base = Traits::kSegmentInShared ? reinterpret_cast<Float4*>(smem + Memory::kSegment) : own + kStored;
  }

  // Chunks [begin, end) of the sequence; what they add up to is left in `total`.
  __device__ __forceinline__ void run(int begin, int end, int level) {
    total_.clear();
    segment_used_ = running_used_ = false;
    const Keys& keys = block_.keys;
    const int first = max(begin * kChunkSlots, keys.low) / kTile;
    const int last = (min(end * kChunkSlots, keys.end) + kTile - 1) / kTile;
    if (first < last) walk(first, last, level);
  }

  __device__ __forceinline__ void collapse(int level) {
    if (level >= kSegmentLevel) close_quad();
    if (level >= kSequenceLevel) close_segment();
    if (level >= kSegmentLevel) recall(level);
  }

  // With exact the second pass continues: the states of all levels are left apart.
  __device__ __forceinline__ void write_open(int level, int slot) {
    write_partial(block_.plan.slots);
    if (level >= kSegmentLevel) {
      recall_or_clear(segment_, segment_used_);
      write_partial(block_.plan.slots + 1);
    }
    if (level >= kSequenceLevel) {
      recall_or_clear(running_, running_used_);
      write_partial(slot);
    }
  }

  __device__ __forceinline__ void write_partial(int slot) {
    const TreeAttentionLaunch& plan = block_.plan;
#pragma unroll
    for (int r = 0; r < Traits::kRows; ++r) {
      const int row = engine_.row(r);
      if (!block_.in_use(row)) continue;
      const int64_t index = partial_row(plan, block_.b, block_.h, slot, row);
      if (engine_.writes_stats()) {
        *reinterpret_cast<Float2*>(plan.partial_stats + index * 2) = {total_.m[r], total_.l[r]};
      }
      for_each_pair(r, [&](int column, float x, float y) {
        *reinterpret_cast<Float2*>(plan.partial_out + index * plan.p.head_dim + column) = {x, y};
      });
    }
  }

  __device__ __forceinline__ void write_out() {
    const TreeAttentionLaunch& plan = block_.plan;
    using T = typename Traits::T;
#pragma unroll
    for (int r = 0; r < Traits::kRows; ++r) {
      const int row = engine_.row(r);
      if (row >= block_.end_row) continue;
      const float factor =
          finish_row(plan, block_.b, block_.h, row, total_.m[r], total_.l[r], engine_.writes_stats());
      T* out = out_row<T>(plan, block_.b, block_.h, row);
      const bool seen = total_.l[r] != 0.0f;
      for_each_pair(r, [&](int column, float x, float y) {
        store_pair<T>(plan, out + column, seen ? ptx::mul(x, factor) : 0.0f, seen ? ptx::mul(y, factor) : 0.0f);
      });
    }
  }

  __device__ __forceinline__ void clear() { total_.clear(); }

 private:
  template <class F>
  __device__ __forceinline__ void for_each_pair(int r, const F& f) {
#pragma unroll
    for (int v = 0; v < Traits::kVectors; ++v) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        if (Traits::row_of(v, e) != r) continue;
        const int column = engine_.column(v) + (Traits::kWideVectors ? e : 0);
        if (column < block_.plan.p.head_dim) f(column, total_.acc[v][e], total_.acc[v][e + 1]);
      }
    }
  }

  // Where row `position` of the cache begins, in elements from k_cache and v_cache.
  __device__ __forceinline__ void look_up(int position, int64_t& k, int64_t& v) const {
    k = v = -1;
    if (position >= block_.keys.end) return;
    const TreeAttentionParams& p = block_.plan.p;
    int64_t page, within;
    block_.locate(position, page, within);
    k = page * p.k_stride[0] + within * p.k_stride[1] + block_.h * p.k_stride[2];
    v = page * p.v_stride[0] + within * p.v_stride[1] + block_.h * p.v_stride[2];
  }

  __device__ __forceinline__ int64_t* offsets(int stage) const {
    return reinterpret_cast<int64_t*>(smem_ + Memory::kOffsets) + stage * kTile * 2;
  }

  __device__ __forceinline__ void walk(int first, int last, int level) {
    const int thread = int(threadIdx.x);
    __syncthreads();  // the ring and the offsets may still be read from the span before
    for (int i = thread; i < kStages * kTile; i += kThreads) {
      int64_t k, v;
      look_up(first * kTile + i, k, v);
      offsets(i / kTile)[i % kTile * 2] = k;
      offsets(i / kTile)[i % kTile * 2 + 1] = v;
    }
    __syncthreads();
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) {
      if (first + stage < last) engine_.copy(smem_ + stage * Traits::kStageBytes, offsets(stage));
      ptx::cp_async_commit();
    }

    int stage = 0;
    bool fresh = true;
    for (int t = first; t < last; ++t) {
      // Tile t + kStages will be copied in the next turn: its pages are looked up now, in the shadow of the
      // arithmetic, and written behind it.
      int64_t next_k = -1, next_v = -1;
      if (thread < kTile && t + kStages < last) look_up((t + kStages) * kTile + thread, next_k, next_v);

      ptx::cp_async_wait<kStages - 2>();
      __syncthreads();
      const int fill = stage == 0 ? kStages - 1 : stage - 1;
      if (t + kStages - 1 < last) engine_.copy(smem_ + fill * Traits::kStageBytes, offsets(fill));
      ptx::cp_async_commit();

      if (fresh) engine_.begin_chunk();
      const int from = t * kTile;
      const bool full = from >= block_.keys.full_from && from + kTile <= block_.keys.length;
      unsigned char* tile = smem_ + stage * Traits::kStageBytes;
      if (full) {
        engine_.template tile<false>(tile, from);
      } else {
        engine_.template tile<true>(tile, from);
      }
      if (thread < kTile) {
        offsets(stage)[thread * 2] = next_k;
        offsets(stage)[thread * 2 + 1] = next_v;
      }
      stage = stage + 1 == kStages ? 0 : stage + 1;

      fresh = (t + 1) % (kChunkSlots / kTile) == 0;
      if (fresh || t + 1 == last) {
        engine_.end_chunk();
        total_.merge(engine_.chunk);
        const int chunks = (t + 1) / (kChunkSlots / kTile);
        if (level >= kSegmentLevel && fresh && chunks % kQuadChunks == 0) close_quad();
        if (level >= kSequenceLevel && fresh && chunks % kSegmentChunks == 0) close_segment();
      }
    }
    ptx::cp_async_wait<0>();
  }

  __device__ __forceinline__ void close_quad() {
    if (segment_used_) {
      segment_.merge(total_);
    } else {
      segment_.store(total_);
    }
    segment_used_ = true;
    total_.clear();
  }

  // Between quads: `total_` is free.
  __device__ __forceinline__ void close_segment() {
    if (!segment_used_) return;
    segment_.load(total_);
    if (running_used_) {
      running_.merge(total_);
    } else {
      running_.store(total_);
    }
    running_used_ = true;
    segment_used_ = false;
    total_.clear();
  }

  __device__ __forceinline__ void recall(int level) {
    if (level >= kSequenceLevel) {
      recall_or_clear(running_, running_used_);
    } else {
      recall_or_clear(segment_, segment_used_);
    }
  }

  __device__ __forceinline__ void recall_or_clear(const StoredState<Traits>& stored, bool used) {
    if (used) {
      stored.load(total_);
    } else {
      total_.clear();
    }
  }

  const Block& block_;
  unsigned char* smem_;
  Engine engine_;
  State<Traits> total_;
  StoredState<Traits> segment_, running_;
  bool segment_used_ = false, running_used_ = false;
};

// The first pass: a block takes kBlockRows packed rows of one KV head and every splits-th span.
template <class Engine>
__device__ __forceinline__ void attend_first(const TreeAttentionLaunch& plan) {
  using Traits = typename Engine::Traits;
  const int b = int(blockIdx.z), h = int(blockIdx.y);
  const int row_block = int(blockIdx.x) % plan.row_blocks, split = int(blockIdx.x) / plan.row_blocks;
  const Sequence sequence(plan, b);
  if (split >= (sequence.direct ? 1 : sequence.spans)) return;

  const TreeAttentionParams& p = plan.p;
  const int length = sequence.length, end = length + sequence.nodes;
  const int low = p.window > 0 && p.window <= length ? int(length - p.window + 1) : 0;
  const int full_from = p.window > 0 && p.window <= end ? int(end - p.window) : 0;
  const int first_row = row_block * Traits::kBlockRows;
  const Block block{plan,      sequence, {length, end, low, full_from}, b, h, first_row,
                    min(first_row + Traits::kBlockRows, plan.rows), -1,  nullptr};
  const bool idle = first_row / plan.group >= sequence.nodes;
  if (idle && !sequence.direct) return;

  Stream<Engine> stream(block, dynamic_smem<unsigned char>());
  if (idle) {
    stream.clear();
    stream.write_out();
    return;
  }
  const bool open = sequence.open(plan);
  for (int i = split; i < (sequence.direct ? 1 : sequence.spans); i += plan.splits) {
    const int span = sequence.first_span + i;
    const int begin = max(span * sequence.span, sequence.first_chunk);
    const int stop = min((span + 1) * sequence.span, sequence.chunk_end);
    stream.run(begin, stop, sequence.level);
    if (open && i == sequence.spans - 1) {
      stream.write_open(sequence.level, i);
      return;
    }
    stream.collapse(sequence.level);
    if (sequence.direct) {
      stream.write_out();
    } else {
      stream.write_partial(i);
    }
  }
}

// The second pass of exact: a block takes one node and walks the keys of its path from the chunk in which the
// sequence's committed tokens end, position by position, as decoding would.
template <class Engine>
__device__ __forceinline__ void attend_paths(const TreeAttentionLaunch& plan) {
  using Traits = typename Engine::Traits;
  const int b = int(blockIdx.z), h = int(blockIdx.y);
  const int blocks_per_node = (plan.group + Traits::kBlockRows - 1) / Traits::kBlockRows;
  const int node = int(blockIdx.x) / blocks_per_node;
  const Sequence sequence(plan, b);
  if (node >= sequence.nodes) return;

  const TreeAttentionParams& p = plan.p;
  const int64_t* ancestors = p.ancestors + (int64_t(b) * p.nodes + node) * p.words;
  const int end = sequence.length + path_length(p, ancestors, node);
  const int low = p.window > 0 && p.window <= end ? int(end - p.window) : 0;
  const int first_row = node * plan.group + int(blockIdx.x) % blocks_per_node * Traits::kBlockRows;
  unsigned char* smem = dynamic_smem<unsigned char>();
  int16_t* path = reinterpret_cast<int16_t*>(smem + StreamMemory<Traits>::kPath);
  list_path<Traits::kThreads>(ancestors, node, path);
  __syncthreads();

  const Block block{plan, sequence, {end, end, low, low}, b, h, first_row,
                    min(first_row + Traits::kBlockRows, (node + 1) * plan.group), node, path};
  Stream<Engine> stream(block, smem);
  const int tail = sequence.length / kChunkSlots;
  for (int chunk = max(tail, low / kChunkSlots); chunk * kChunkSlots < end; ++chunk) {
    stream.run(chunk, chunk + 1, kChunkLevel);
    stream.write_partial(plan.slots + 2 + chunk - tail);
  }
}

}  // namespace tranche
