// How a block walks its keys: which spans it takes, the ring of tiles in shared memory that cp.async fills
// ahead of the arithmetic, and where partial results go. The arithmetic is an Engine (tree_attention_mma.cuh,
// tree_attention_ffma.cuh):
//
//   Engine::Traits         kThreads, kBlockRows, kTile, kStages, kStageBytes, kScratchBytes and the Layout of
//   State Engine(block, smem)    loads the block's rows of q; smem: kScratchBytes of shared memory
//   copy(stage, offsets)   starts the copy of a tile whose rows are at these offsets (of k and v, in
//   elements; < 0: zeros) begin_chunk(), tile(stage, first, full), end_chunk()    a fresh state, in `chunk`
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
  static constexpr int kQuad = (kScratch + Traits::kScratchBytes + 15) / 16 * 16;
  static constexpr int kBytes = kQuad + StoredState<Traits>::kBytes;
  static_assert(kOffsets % 16 == 0 && kScratch % 16 == 0);
  static_assert(kBytes <= 163 * 1024, "shared memory of a block on sm_80");
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

  __device__ __forceinline__ int slot(int position) const {
    if (path_node < 0 || position < sequence.length) return position;
    return sequence.length + path[position - sequence.length];
  }

  // The page of a key, clamped into the cache; or its sequence, where there are no pages.
  __device__ __forceinline__ int page(int position) const {
    const TreeAttentionParams& p = plan.p;
    if (p.block_table == nullptr) return b;
    return clamp_int(p.block_table[b * p.block_table_stride + slot(position) / p.page_size], 0,
                     p.num_pages - 1);
  }

  // Where the row of a key on `page` begins, in elements.
  __device__ __forceinline__ int64_t offset(int position, int page, const int64_t (&stride)[3]) const {
    int within = slot(position);
    if (plan.p.block_table != nullptr) within %= plan.p.page_size;
    return page * stride[0] + within * stride[1] + h * stride[2];
  }
};

// Position t of 0, 1, ... of the path of a node: its ancestors in order of index, which is the order of
// depth.
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
      : block_(block), smem_(smem), engine_(block, smem + Memory::kScratch) {
    constexpr int kStored = StoredState<Traits>::kBytes / int(sizeof(Float4));
    const int64_t index = (int64_t(block.b) * block.plan.p.heads_kv + block.h) * gridDim.x + blockIdx.x;
    running_ = reinterpret_cast<Float4*>(block.plan.running) + index * 2 * kStored;
  }

  // Chunks [begin, end) of the sequence, which are a span of the level, go to partial result `slot`, or out.
  // If the second pass of exact is to continue them (`open`), the states of all levels are written apart.
  __device__ __forceinline__ void run(int begin, int end, int level, bool open, int slot) {
    used_ = 0;
    const int top = max(level - kQuadLevel, 0);
    const Keys& keys = block_.keys;
    const int first = max(begin * kChunkSlots, keys.low) / kTile;
    const int last = (min(end * kChunkSlots, keys.end) + kTile - 1) / kTile;
    if (first < last) {
      walk(first, last, top, open);
    } else {
      engine_.chunk.clear();
    }
#pragma unroll 1
    for (int piece = 0; piece <= (open ? top : 0); ++piece) {
      if (open) {
        if (used_ >> piece & 1) {
          stored(piece).load(engine_.chunk);
        } else {
          engine_.chunk.clear();
        }
      }
      if (block_.sequence.direct) {
        write_out();
      } else {
        write_partial(!open || piece == 2 ? slot : block_.plan.slots + piece);
      }
    }
  }

 private:
  // 0: the quad's state, 1: the segment's, 2: the sequence's. Bits of used_ say which there are.
  __device__ __forceinline__ StoredState<Traits> stored(int target) const {
    constexpr int kStored = StoredState<Traits>::kBytes / int(sizeof(Float4));
    return {target == 0 ? reinterpret_cast<Float4*>(smem_ + Memory::kQuad)
                        : running_ + (target - 1) * kStored};
  }

  // The chunk in registers joins its quad, a completed quad its segment, and so on. `chunks` are done, the
  // last of them wholly if `complete`. If the span ends here (`finishing`) its state is left in the
  // registers.
  __device__ __forceinline__ void join(int chunks, bool complete, bool finishing, int top) {
#pragma unroll 1
    for (int target = 0; target <= top; ++target) {
      const bool used = used_ >> target & 1;
      if (used) stored(target).merge(engine_.chunk);
      const int size = target == 0 ? kQuadChunks : kSegmentChunks;
      const bool rises = target < top && (finishing || (complete && chunks % size == 0));
      if (!rises && !finishing) {
        if (!used) stored(target).store(engine_.chunk);
        used_ |= 1 << target;
        return;
      }
      if (used) stored(target).load(engine_.chunk);
      used_ &= ~(1 << target);
    }
  }

  __device__ __forceinline__ void write_partial(int slot) {
    const TreeAttentionLaunch& plan = block_.plan;
#pragma unroll
    for (int r = 0; r < Traits::kRows; ++r) {
      const int row = ptx::opaque(engine_.row(r));
      if (!block_.in_use(row)) continue;
      const int64_t index = partial_row(plan, block_.b, block_.h, slot, row);
      if (engine_.writes_stats()) {
        *reinterpret_cast<Float2*>(plan.partial_stats + index * 2) = {engine_.chunk.m[r], engine_.chunk.l[r]};
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
      const int row = ptx::opaque(engine_.row(r));
      if (row >= block_.end_row) continue;
      const float sum = block_.in_use(row) ? engine_.chunk.l[r] : 0.0f;  // rows past n_nodes give zeros
      const auto row_end = finish_row<Traits::kNatural>(plan, block_.b, block_.h, row, engine_.chunk.m[r],
                                                        sum, engine_.writes_stats());
      T* out = out_row<T>(plan, block_.b, block_.h, row);
      for_each_pair(r, [&](int column, float x, float y) {
        store_pair<T>(plan, out + column, row_end(x), row_end(y));
      });
    }
  }

  template <class F>
  __device__ __forceinline__ void for_each_pair(int r, const F& f) {
#pragma unroll
    for (int v = 0; v < Traits::kVectors; ++v) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        if (Traits::row_of(v, e) != r) continue;
        const int column = ptx::opaque(engine_.column(v)) + (Traits::kWideVectors ? e : 0);
        if (column < block_.plan.p.head_dim) f(column, engine_.chunk.acc[v][e], engine_.chunk.acc[v][e + 1]);
      }
    }
  }

  __device__ __forceinline__ int64_t* offsets(int stage) const {
    return reinterpret_cast<int64_t*>(smem_ + Memory::kOffsets) + stage * kTile * 2;
  }

  __device__ __forceinline__ void put_offsets(int stage, int i, int position, int page) const {
    const TreeAttentionParams& p = block_.plan.p;
    const bool valid = position < block_.keys.end;
    offsets(stage)[i * 2] = valid ? block_.offset(position, page, p.k_stride) : -1;
    offsets(stage)[i * 2 + 1] = valid ? block_.offset(position, page, p.v_stride) : -1;
  }

  __device__ __forceinline__ void walk(int first, int last, int top, bool open) {
    const int thread = int(threadIdx.x), end = block_.keys.end;
    __syncthreads();  // the ring and the offsets may still be read from the span before
    for (int i = thread; i < kStages * kTile; i += kThreads) {
      const int position = first * kTile + i;
      put_offsets(i / kTile, i % kTile, position, position < end ? block_.page(position) : 0);
    }
    __syncthreads();

    engine_.begin_chunk();
    // Turn t starts the copy of tile t and computes tile t - (kStages - 1).
    int fill = 0, stage = 0;
#pragma unroll 1
    for (int t = first; t < last + kStages - 1; ++t) {
      const int now = t - (kStages - 1);
      // Tile t + 1 is copied in the next turn: its pages are looked up now, in the shadow of the arithmetic,
      // and written behind it.
      const bool looks_up = now >= first && thread < kTile;
      const int position = (t + 1) * kTile + thread;
      int page = 0;
      if (looks_up && position < end) page = block_.page(position);

      if (now >= first) {
        ptx::cp_async_wait<kStages - 2>();
        __syncthreads();
      }
      if (t < last) engine_.copy(smem_ + fill * Traits::kStageBytes, offsets(fill));
      ptx::cp_async_commit();
      fill = fill + 1 == kStages ? 0 : fill + 1;
      if (now < first) continue;

      const int from = now * kTile;
      const bool full = from >= block_.keys.full_from && from + kTile <= block_.keys.length;
      engine_.tile(smem_ + stage * Traits::kStageBytes, from, full);
      if (looks_up) put_offsets(stage, thread, (now + kStages) * kTile + thread, page);
      stage = stage + 1 == kStages ? 0 : stage + 1;

      const bool at_end = now + 1 == last, complete = (now + 1) % (kChunkSlots / kTile) == 0;
      if (complete || at_end) {
        engine_.end_chunk();
        join((now + 1) / (kChunkSlots / kTile), complete, at_end && !open, top);
        if (!at_end) engine_.begin_chunk();
      }
    }
    ptx::cp_async_wait<0>();
  }

  const Block& block_;
  unsigned char* smem_;
  Engine engine_;
  Float4* running_;
  int used_ = 0;
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
  const Block block{plan,
                    sequence,
                    {length, end, low, full_from},
                    b,
                    h,
                    first_row,
                    min(first_row + Traits::kBlockRows, plan.rows),
                    -1,
                    nullptr};
  const bool idle = first_row / plan.group >= sequence.nodes;
  if (idle && !sequence.direct) return;

  Stream<Engine> stream(block, dynamic_smem<unsigned char>());
  for (int i = split; i < (sequence.direct ? 1 : sequence.spans); i += plan.splits) {
    const int span = sequence.first_span + i;
    const int begin = max(span * sequence.span, sequence.first_chunk);
    const int stop = min((span + 1) * sequence.span, sequence.chunk_end);
    stream.run(begin, idle ? begin : stop, sequence.level, sequence.open(plan) && i == sequence.spans - 1, i);
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
  const int end = sequence.length + uniform(path_length(ancestors, node));
  const int low = p.window > 0 && p.window <= end ? int(end - p.window) : 0;
  const int first_row = node * plan.group + int(blockIdx.x) % blocks_per_node * Traits::kBlockRows;
  unsigned char* smem = dynamic_smem<unsigned char>();
  int16_t* path = reinterpret_cast<int16_t*>(smem + StreamMemory<Traits>::kPath);
  list_path<Traits::kThreads>(ancestors, node, path);
  __syncthreads();

  const Block block{plan,
                    sequence,
                    {end, end, low, low},
                    b,
                    h,
                    first_row,
                    min(first_row + Traits::kBlockRows, (node + 1) * plan.group),
                    node,
                    path};
  Stream<Engine> stream(block, smem);
  const int tail = sequence.length / kChunkSlots;
  for (int chunk = max(tail, low / kChunkSlots); chunk * kChunkSlots < end; ++chunk) {
    stream.run(chunk, chunk + 1, kChunkLevel, false, plan.slots + 2 + chunk - tail);
  }
}

}  // namespace tranche
