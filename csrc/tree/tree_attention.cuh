// What the CUDA kernels of tree_attention share: the plan of a launch, a sequence's chunks, where a key is,
// which keys a row sees, and the softmax state with its one way of merging. docs/tree.md has the picture.
//
// The order of every sum is a function of key positions alone:
//   tile     64 slots (32 for D > 128): scores, their maximum, one rescale, then P V in MMA groups of 16
//   chunk    256 slots, from a fresh state
//   quad     4 chunks, segment 16 chunks: merged in order, a segment from its quads
//   sequence its segments in order
// All at absolute multiples. A block may own a chunk, a quad, a segment or a sequence: whatever it is,
// merge() meets the same operands in the same order, so the choice, which depends on lengths and on the size
// of the launch, cannot be seen in the bits.
#pragma once

#include "core/launch.cuh"
#include "core/ptx.cuh"
#include "tree/tree_attention.h"

namespace tranche {

constexpr int kChunkSlots = 256;
constexpr int kQuadChunks = 4;
constexpr int kSegmentChunks = 16;
constexpr int kMaxNodes = 1024;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kMinusInfinity = -__builtin_inff();

// What a block owns; a finished one is a partial result.
enum SpanLevel : int { kChunkLevel, kQuadLevel, kSegmentLevel, kSequenceLevel };

// One launch, planned on the host. R = N * group is the number of packed rows per KV head: row = node * group
// + query head within the group.
struct TreeAttentionLaunch {
  TreeAttentionParams p;
  float* partial_out;    // [B, Hkv, all_slots, R, D] not yet divided by the sum
  float* partial_stats;  // [B, Hkv, all_slots, R, 2] maximum (in the unit of ScoreMap) and sum
  float* running;        // [blocks, 2] stored states of blocks that own sequences or segments; thread-private
  float score_factor;    // what ScoreMap multiplies q k with, but for k_scale
  int32_t group, rows;   // Hq / Hkv, N * group
  int32_t row_blocks;    // blocks over the packed rows
  int32_t splits;        // blocks over the chunks of a sequence
  int32_t slots;         // partial results kept per row for complete spans
  int32_t all_slots;     // slots; with exact then the open quad, the open segment, and the tail's chunks
  bool paths;            // exact's second pass: a block takes one node and walks its own path
  bool aligned_kv;       // 16-byte loads are possible
  bool aligned_q;        // 16-byte loads of q are possible
  bool aligned_out;      // 4-byte stores of out are possible
};

TRANCHE_HD int clamp_int(int x, int low, int high) { return x < low ? low : (x > high ? high : x); }

// A value that all lanes of the warp have, as the compiler can see: the branches on it then do not divide the
// warp, and shuffles behind them need no precautions.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// What a sequence asks for: the same answer in every kernel of a launch.
struct Sequence {
  int length, nodes;           // committed tokens, nodes in use
  int first_chunk, chunk_end;  // chunks of the first pass that some row may see
  int level, span;             // SpanLevel and its chunks
  int first_span, spans;
  bool direct;  // one block sees all: it writes out itself

  __device__ __forceinline__ Sequence(const TreeAttentionLaunch& plan, int b) {
    const TreeAttentionParams& p = plan.p;
    nodes = uniform(clamp_int(p.n_nodes[b], 0, p.nodes < p.capacity ? p.nodes : p.capacity));
    length = uniform(clamp_int(p.cache_seqlens[b], 0, p.capacity - nodes));
    // From chunk length / 256 on, exact leaves everything to the second pass.
    chunk_end = p.exact ? length / kChunkSlots : (length + nodes + kChunkSlots - 1) / kChunkSlots;
    first_chunk = 0;
    if (p.window > 0 && p.window <= length) first_chunk = int((length - p.window + 1) / kChunkSlots);
    if (first_chunk > chunk_end) first_chunk = chunk_end;

    const int quads = (chunk_end + kQuadChunks - 1) / kQuadChunks - first_chunk / kQuadChunks;
    if (plan.splits == 1) {
      level = kSequenceLevel, span = chunk_end > 0 ? chunk_end : 1;
    } else if (chunk_end - first_chunk <= plan.splits) {
      level = kChunkLevel, span = 1;
    } else if (quads <= plan.splits) {
      level = kQuadLevel, span = kQuadChunks;
    } else {
      level = kSegmentLevel, span = kSegmentChunks;
    }
    first_span = first_chunk / span;
    spans = chunk_end > first_chunk ? (chunk_end + span - 1) / span - first_span : 0;
    direct = !p.exact && spans <= 1;
  }

  // With exact the last quad and segment of the first pass may be continued by the second.
  __device__ __forceinline__ bool open(const TreeAttentionLaunch& plan) const {
    return plan.p.exact && spans > 0 && (level == kSequenceLevel || chunk_end % span != 0);
  }
};

// ---- rows and the keys they see

// The keys a block walks, by position. In the first pass a key's position is its slot.
struct Keys {
  int length;     // keys before this one are seen by all rows that the window lets see them
  int end;        // one past the last key
  int low;        // no row of the sequence sees keys before this one
  int full_from;  // from here on to length every row sees every key
};

struct Row {
  const int64_t* ancestors;  // null if nothing is seen
  int node, depth;
};

__device__ __forceinline__ uint64_t low_bits(int64_t count) {
  return count <= 0 ? 0 : (count >= 64 ? ~uint64_t(0) : (uint64_t(1) << count) - 1);
}

// Bit c: the row sees key first + c. Called only for tiles that some row does not see in full.
__device__ __forceinline__ uint64_t visible_keys(const TreeAttentionLaunch& plan, const Keys& keys,
                                                 const Row& row, int b, int first) {
  if (row.ancestors == nullptr) return 0;
  const TreeAttentionParams& p = plan.p;
  const int64_t last_hidden =
      p.window > 0 ? int64_t(plan.paths ? keys.length - 1 : keys.length + row.depth) - p.window : int64_t(-1);
  const uint64_t prefix = low_bits(int64_t(keys.length) - first);
  const uint64_t seen = prefix & ~low_bits(last_hidden + 1 - first);
  const int j0 = first - keys.length;  // the node of key `first`
  if (plan.paths || j0 > row.node || j0 <= -64) return seen;

  uint64_t nodes;
  if (j0 < 0) {
    nodes = uint64_t(row.ancestors[0]) << -j0;
  } else {
    nodes = uint64_t(row.ancestors[j0 / 64]) >> (j0 % 64);
    if (j0 % 64 != 0 && j0 / 64 + 1 < p.words)
      nodes |= uint64_t(row.ancestors[j0 / 64 + 1]) << (64 - j0 % 64);
  }
  nodes &= low_bits(int64_t(row.node) - j0 + 1);  // an ancestor comes no later than the node itself
  if (p.window > 0 && row.depth >= p.window) {
    const int32_t* depth = p.depth + int64_t(b) * p.nodes;
    for (uint64_t rest = nodes; rest != 0; rest &= rest - 1) {
      const int c = __ffsll(static_cast<long long>(rest)) - 1;
      if (depth[j0 + c] <= row.depth - p.window) nodes &= ~(uint64_t(1) << c);
    }
  }
  return seen | (nodes & ~prefix);
}

// Nodes on the path to `node`, itself included; only ancestors up to the node itself count.
__device__ __forceinline__ int path_length(const int64_t* ancestors, int node) {
  int length = 0;
  for (int w = 0; w <= node / 64; ++w) {
    length += __popcll(uint64_t(ancestors[w]) & low_bits(int64_t(node) - w * 64 + 1));
  }
  return length;
}

// ---- the softmax state

// The weight of a score that is `difference` above another, whose weight is 1. Scores are to base 2; or
// natural, which costs a product more and keeps float32's lse as near as the score itself.
template <bool kNatural>
__device__ __forceinline__ float weight_of(float difference) {
  return ptx::exp2_approx(kNatural ? ptx::mul(difference, kLog2e) : difference);
}

// How one row's partial result joins its running one. A part that saw no key leaves the running state as it
// is, and the first that did is copied: neither touches a bit.
template <bool kNatural>
struct Fold {
  float run, part;
  bool keep, take;

  __device__ __forceinline__ Fold(float& m, float& l, float part_m, float part_l) {
    keep = part_l == 0.0f;
    take = !keep && l == 0.0f;
    const float top = fmaxf(m, part_m);
    run = m == top ? 1.0f : weight_of<kNatural>(m - top);
    part = part_m == top ? 1.0f : weight_of<kNatural>(part_m - top);
    if (take) {
      m = part_m, l = part_l;
    } else if (!keep) {
      m = top, l = fmaf(l, run, ptx::mul(part_l, part));
    }
  }

  __device__ __forceinline__ float operator()(float x, float y) const {
    return keep ? x : (take ? y : fmaf(x, run, ptx::mul(y, part)));
  }
};

struct alignas(16) Float4 {
  float v[4];
};
struct alignas(8) Float2 {
  float x, y;
};

// A thread's share of a softmax state. Layout says which of the thread's rows a value belongs to:
// kVectors, kRows, row_of(vector, element); kNatural is the unit of m.
template <class Layout>
struct State {
  float acc[Layout::kVectors][4];
  float m[Layout::kRows], l[Layout::kRows];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int v = 0; v < Layout::kVectors; ++v) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[v][e] = 0.0f;
    }
#pragma unroll
    for (int r = 0; r < Layout::kRows; ++r) m[r] = kMinusInfinity, l[r] = 0.0f;
  }

  __device__ __forceinline__ void merge(const State& part) {
#pragma unroll
    for (int r = 0; r < Layout::kRows; ++r) {
      const Fold<Layout::kNatural> fold(m[r], l[r], part.m[r], part.l[r]);
#pragma unroll
      for (int v = 0; v < Layout::kVectors; ++v) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (Layout::row_of(v, e) == r) acc[v][e] = fold(acc[v][e], part.acc[v][e]);
        }
      }
    }
  }
};

// A state in memory that only its own thread reads and writes: no barrier is needed, and neighbouring threads
// lie next to each other.
template <class Layout>
struct StoredState {
  static_assert(Layout::kRows % 2 == 0);
  static constexpr int kWords = Layout::kVectors + Layout::kRows / 2;
  static constexpr int kBytes = kWords * Layout::kThreads * int(sizeof(Float4));
  Float4* base;

  __device__ __forceinline__ Float4& word(int i) const {
    return base[i * Layout::kThreads + int(threadIdx.x)];
  }

  __device__ __forceinline__ void store(const State<Layout>& s) const {
#pragma unroll
    for (int v = 0; v < Layout::kVectors; ++v) word(v) = {s.acc[v][0], s.acc[v][1], s.acc[v][2], s.acc[v][3]};
#pragma unroll
    for (int r = 0; r < Layout::kRows; r += 2) {
      word(Layout::kVectors + r / 2) = {s.m[r], s.l[r], s.m[r + 1], s.l[r + 1]};
    }
  }

  __device__ __forceinline__ void load(State<Layout>& s) const {
#pragma unroll
    for (int v = 0; v < Layout::kVectors; ++v) {
      const Float4 x = word(v);
#pragma unroll
      for (int e = 0; e < 4; ++e) s.acc[v][e] = x.v[e];
    }
#pragma unroll
    for (int r = 0; r < Layout::kRows; r += 2) {
      const Float4 x = word(Layout::kVectors + r / 2);
      s.m[r] = x.v[0], s.l[r] = x.v[1], s.m[r + 1] = x.v[2], s.l[r + 1] = x.v[3];
    }
  }

  // Merges `part` into what is stored, a vector at a time: a second state in registers is not to be had.
  __device__ __forceinline__ void merge(const State<Layout>& part) const {
#pragma unroll
    for (int r = 0; r < Layout::kRows; r += 2) {
      Float4& stats = word(Layout::kVectors + r / 2);
      Float4 x = stats;
      const Fold<Layout::kNatural> even(x.v[0], x.v[1], part.m[r], part.l[r]);
      const Fold<Layout::kNatural> odd(x.v[2], x.v[3], part.m[r + 1], part.l[r + 1]);
      stats = x;
#pragma unroll
      for (int v = 0; v < Layout::kVectors; ++v) {
        if (Layout::row_of(v, 0) / 2 != r / 2) continue;
        if (v % 4 == 0) __syncwarp();  // nothing is loaded ahead of this: registers are short here
        Float4 a = word(v);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          a.v[e] = Layout::row_of(v, e) == r ? even(a.v[e], part.acc[v][e]) : odd(a.v[e], part.acc[v][e]);
        }
        word(v) = a;
      }
    }
  }
};

// ---- results

__device__ __forceinline__ int64_t partial_row(const TreeAttentionLaunch& plan, int b, int h, int slot,
                                               int row) {
  return ((int64_t(b) * plan.p.heads_kv + h) * plan.all_slots + slot) * plan.rows + row;
}

// From the accumulated values of a finished row to its output. float32 divides: of one key it then gives back
// the value exactly.
template <bool kNatural>
struct RowEnd {
  float factor, total;
  bool seen;

  __device__ __forceinline__ float operator()(float x) const {
    if (!seen) return 0.0f;
    return kNatural ? ptx::mul(x, factor) / total : ptx::mul(x, factor);
  }
};

// Writes the row's lse if `write_lse`.
template <bool kNatural>
__device__ __forceinline__ RowEnd<kNatural> finish_row(const TreeAttentionLaunch& plan, int b, int h, int row,
                                                       float m, float l, bool write_lse) {
  const TreeAttentionParams& p = plan.p;
  const int node = row / plan.group, head = h * plan.group + row % plan.group;
  if (write_lse && p.lse != nullptr) {
    const float log_sum = ptx::log2_approx(l);
    const float lse = kNatural ? fmaf(log_sum, kLn2, m) : ptx::mul(m + log_sum, kLn2);
    p.lse[(int64_t(b) * p.nodes + node) * p.heads_q + head] = l == 0.0f ? kMinusInfinity : lse;
  }
  float total = l;
  if (p.sinks != nullptr) {
    const float sink = p.sinks[head];
    total += weight_of<kNatural>((kNatural ? sink : ptx::mul(sink, kLog2e)) - m);
  }
  const float scale = p.v_scale != nullptr ? p.v_scale[h] : 1.0f;
  return {kNatural ? scale : ptx::mul(ptx::reciprocal_approx(total), scale), total, l != 0.0f};
}

// A score from q k: times scale; with a softcap, softcap * tanh(q k scale / softcap). To base 2 the same
// times log2 e, and e^2y = 2^(2y log2 e) for the tanh.
template <bool kNatural>
struct ScoreMap {
  float factor;  // of q k: to the score, or to the argument of tanh or of its exponential
  float bound;   // what tanh is multiplied with, or 0

  __device__ __forceinline__ ScoreMap(const TreeAttentionLaunch& plan, int h) {
    const TreeAttentionParams& p = plan.p;
    factor = plan.score_factor;
    if (p.k_scale != nullptr) factor = ptx::mul(factor, p.k_scale[h]);
    bound = kNatural ? p.softcap : ptx::mul(p.softcap, kLog2e);
  }

  __device__ __forceinline__ float cap(float x) const {
    const float tanh =
        kNatural ? tanhf(x) : fmaf(-2.0f, ptx::reciprocal_approx(ptx::exp2_approx(x) + 1.0f), 1.0f);
    return ptx::mul(tanh, bound);
  }
};

template <class T>
__device__ __forceinline__ void store_pair(const TreeAttentionLaunch& plan, T* out, float x, float y) {
  if constexpr (sizeof(T) == 2) {
    const uint32_t pair = ptx::pack<T>(x, y);
    if (plan.aligned_out) {
      *reinterpret_cast<uint32_t*>(out) = pair;
    } else {
      out[0] = {uint16_t(pair)};
      out[1] = {uint16_t(pair >> 16)};
    }
  } else {
    out[0] = from_float<T>(x);
    out[1] = from_float<T>(y);
  }
}

template <class T>
__device__ __forceinline__ T* out_row(const TreeAttentionLaunch& plan, int b, int h, int row) {
  const TreeAttentionParams& p = plan.p;
  return static_cast<T*>(p.out) + b * p.out_stride[0] + (row / plan.group) * p.out_stride[1] +
         (int64_t(h) * plan.group + row % plan.group) * p.out_stride[2];
}

}  // namespace tranche
