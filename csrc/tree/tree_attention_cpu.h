// What the CPU kernels of tree_attention share: how the work is cut, which keys a row sees, and how partial
// results are merged. The kernels themselves are in tree_attention_cpu_{fma,amx,f64}.h.
//
// Layout. The G * n_nodes query rows of one kv head (row = node * G + head in group) are cut into blocks of
// up to 16 tiles of 16 rows. Rows lie along the lanes: scores are [key][16 rows], the running output is
// [d][16 rows], so max, sum and rescale are vertical and no lane depends on another.
//
// Order. Every sum runs by key *position*: slot for the prefix, cache_seqlens + depth for a node. Chunks are
// 256 positions, segments 8 chunks, both at absolute multiples; within a chunk a row's visible keys go in
// ascending position and invisible ones are exact no-ops (p = 0 times a finite value). So a row has the bits
// of N = 1 decode at its position: exact is the only mode here.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/arena.h"
#include "core/numeric.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "tree/tree_attention.h"

namespace tranche::cpu::TRANCHE_ISA {

constexpr int kLanes = 16;       // rows in a tile
constexpr int kBlockTiles = 16;  // tiles in a block at most
constexpr int kChunk = 256;
constexpr int kSegment = 2048;
constexpr float kLog2e = 1.4426950408889634f;
constexpr double kLog2eF64 = 1.4426950408889634;
static_assert(kSegment % kChunk == 0 && kLanes % kWidth == 0);

TRANCHE_INLINE int node_count(const TreeAttentionParams& p, int b) {
  return int(least<int64_t>(most(p.n_nodes[b], 0), p.nodes));
}
TRANCHE_INLINE int committed(const TreeAttentionParams& p, int b) {
  return int(
      least<int64_t>(most(p.cache_seqlens[b], 0), most<int64_t>(int64_t(p.capacity) - node_count(p, b), 0)));
}

// How a call is cut into tasks. Nothing here changes a bit of the result.
struct Geometry {
  int group;        // query heads per kv head
  int padded_dim;   // D rounded up to 16
  int block_tiles;  // tiles in a block
  int blocks;       // blocks per kv head, at capacity
  int segments;     // of the longest sequence
  bool split;       // one task per segment, with the partial results in the workspace, instead of one for all
  int64_t heads;    // (sequence, kv head, block) triples
  int64_t tasks;
  int workers;
};

TRANCHE_INLINE Geometry geometry(const TreeAttentionParams& p) {
  Geometry g;
  g.group = p.heads_q / p.heads_kv;
  g.padded_dim = int(round_up(p.head_dim, 16));
  const int64_t rows = int64_t(p.nodes) * g.group, tiles = round_up(rows, kLanes) / kLanes;
  g.block_tiles = int(least<int64_t>(tiles, kBlockTiles));
  g.blocks = int(round_up(tiles, kBlockTiles) / kBlockTiles);
  int64_t longest = 0;
  for (int b = 0; b < p.batch; ++b)
    longest = most<int64_t>(longest, int64_t(committed(p, b)) + node_count(p, b));
  g.segments = int(most<int64_t>(round_up(longest, kSegment) / kSegment, 1));
  g.heads = int64_t(p.batch) * p.heads_kv * g.blocks;
  const int threads = num_threads();
  g.split = threads > 1 && g.segments > 1 && g.heads < 4 * int64_t(threads);
  g.tasks = g.split ? g.heads * g.segments : g.heads;
  g.workers = int(least<int64_t>(threads, g.tasks));
  return g;
}

// Where the rows of one kv head of one sequence lie in a cache.
class CacheRows {
 public:
  CacheRows(const TreeAttentionParams& p, const void* cache, const int64_t* stride, int element, int b,
            int head)
      : base_(static_cast<const char*>(cache) + head * stride[2] * element),
        outer_(stride[0] * element),
        inner_(stride[1] * element),
        table_(p.block_table ? p.block_table + b * p.block_table_stride : nullptr),
        page_size_(p.page_size),
        last_page_(p.num_pages - 1) {
    if (!table_) base_ += b * outer_;
  }
  const char* row(int64_t slot) const {
    if (!table_) return base_ + slot * inner_;
    const int64_t page = slot / page_size_;
    const int32_t entry = least(most(table_[page], 0), last_page_);
    return base_ + entry * outer_ + (slot - page * page_size_) * inner_;
  }

 private:
  const char* base_;
  int64_t outer_, inner_;
  const int32_t* table_;
  int32_t page_size_, last_page_;
};

// Unnormalised output, base (about the maximum of scores times log2 e) and sum of each row over some keys.
struct Partial {
  float* out;  // [tiles][padded_dim][16]
  float* max;  // [tiles][16]
  float* sum;  // [tiles][16]

  static int64_t floats(const Geometry& g) { return int64_t(g.block_tiles) * kLanes * (g.padded_dim + 2); }
  static Partial at(float* memory, const Geometry& g) {
    const int64_t rows = int64_t(g.block_tiles) * kLanes;
    return {memory, memory + rows * g.padded_dim, memory + rows * (g.padded_dim + 1)};
  }
  void clear(int tiles, int padded_dim) const {
    for (int64_t i = 0; i < int64_t(tiles) * padded_dim * kLanes; ++i) out[i] = 0.0f;
    for (int i = 0; i < tiles * kLanes; ++i) max[i] = -kInf, sum[i] = 0.0f;
  }
};

// Brings the next chunk's rows into the second-level cache while this one is worked on. A row is a few lines
// at a stride of all heads, which hardware prefetchers do not follow. Kernels call work() with the cycles
// that a step takes, so that the requests spread evenly.
class Prefetch {
 public:
  void begin(const CacheRows& k, const CacheRows& v, int64_t first, int keys, int row_bytes) {
    k_ = &k, v_ = &v, first_ = first, rows_ = 2 * keys, next_ = 0, bytes_ = row_bytes;
    progress_ = 0.0f;
  }
  void expect(float cycles) { per_cycle_ = float(rows_) / cycles; }
  void work(float cycles) {
    progress_ += cycles * per_cycle_;
    for (const int until = least(int(progress_), rows_); next_ < until; ++next_) {
      const char* row = (next_ % 2 ? v_ : k_)->row(first_ + next_ / 2);
      for (int i = 0; i < bytes_; i += 64) __builtin_prefetch(row + i, 0, 2);
    }
  }

 private:
  const CacheRows *k_ = nullptr, *v_ = nullptr;
  int64_t first_ = 0;
  int rows_ = 0, next_ = 0, bytes_ = 0;
  float progress_ = 0.0f, per_cycle_ = 0.0f;
};

// The keys of one chunk: its committed slots, then, from row `padded` on, the nodes whose positions lie in
// it.
struct Chunk {
  int64_t first;  // position of the first key
  int prefix;     // committed slots: positions first .. first + prefix - 1
  int padded;     // prefix rounded up to 32
  int nodes;
  bool uniform;         // all rows see all committed slots
  const int32_t* node;  // [nodes] ascending
  const char** k_row;   // [round_up(padded + nodes, 32)] null: no such key
  const char** v_row;
  Prefetch* prefetch;  // of the next chunk
};

// A block of rows, and what each of them sees.
struct Block {
  int b, head_kv;
  int first_row, rows, tiles;  // rows in use
  int seqlen, n;
  int first_node, last_node;
  int32_t min_limit, max_limit;
  int32_t deepest;    // largest depth among the block's rows
  int32_t* limit;     // [tiles * 16] a row sees positions above this
  uint16_t* visible;  // [n][block_tiles] lanes that see the node
  int32_t* depth;     // [n]
  int32_t* list;      // nodes of the chunk at hand
  int32_t* index;     // [n] their places in it
  const char **k_row, **v_row;

  void take(Arena& arena, const TreeAttentionParams& p, const Geometry& g) {
    limit = arena.take<int32_t>(g.block_tiles * kLanes);
    visible = arena.take<uint16_t>(int64_t(p.nodes) * g.block_tiles);
    depth = arena.take<int32_t>(p.nodes);
    list = arena.take<int32_t>(p.nodes);
    index = arena.take<int32_t>(p.nodes);
    k_row = arena.take<const char*>(kChunk + p.nodes + 32);
    v_row = arena.take<const char*>(kChunk + p.nodes + 32);
  }
};

// f(j) for the nodes that node i sees, itself included, in ascending order.
template <class F>
TRANCHE_INLINE void for_each_ancestor(const TreeAttentionParams& p, int b, int i, const F& f) {
  const int64_t* words = p.ancestors + (int64_t(b) * p.nodes + i) * p.words;
  for (int w = 0; w <= i / 64; ++w) {
    uint64_t bits = uint64_t(words[w]);
    if (w == i / 64) {
      bits |= uint64_t(1) << (i % 64);
      bits &= ~uint64_t(0) >> (63 - i % 64);
    }
    for (; bits; bits &= bits - 1) f(w * 64 + __builtin_ctzll(bits));
  }
}

TRANCHE_INLINE int node_depth(const TreeAttentionParams& p, int b, int i) {
  return least(most(p.depth[int64_t(b) * p.nodes + i], 0), i);
}

// Whether a key at position `key` is inside the window of a row at position `row`.
TRANCHE_INLINE bool in_window(const TreeAttentionParams& p, int64_t key, int64_t row) {
  return p.window <= 0 || key > row - p.window;
}

// Fills `block` for a (sequence, kv head, block) triple; false if none of its rows is in use.
static bool describe(Block& block, const TreeAttentionParams& p, const Geometry& g, int64_t triple) {
  const int index = int(triple % g.blocks);
  block.head_kv = int(triple / g.blocks % p.heads_kv);
  block.b = int(triple / g.blocks / p.heads_kv);
  block.n = node_count(p, block.b);
  block.seqlen = committed(p, block.b);
  block.first_row = index * kBlockTiles * kLanes;
  block.rows = int(least<int64_t>(int64_t(block.n) * g.group - block.first_row, g.block_tiles * kLanes));
  if (block.rows <= 0) return false;
  block.tiles = (block.rows + kLanes - 1) / kLanes;
  block.first_node = block.first_row / g.group;
  block.last_node = (block.first_row + block.rows - 1) / g.group;
  for (int i = 0; i < block.n; ++i) block.depth[i] = node_depth(p, block.b, i);
  memset(block.visible, 0, sizeof(uint16_t) * size_t(block.n) * g.block_tiles);
  block.min_limit = INT32_MAX;
  block.max_limit = -1;
  block.deepest = 0;
  for (int lane = 0; lane < block.tiles * kLanes; ++lane) block.limit[lane] = -1;
  for (int i = block.first_node; i <= block.last_node; ++i) {
    const int64_t position = int64_t(block.seqlen) + block.depth[i];
    const int limit = p.window > 0 ? int(most<int64_t>(position - p.window, -1)) : -1;
    block.min_limit = least(block.min_limit, limit);
    block.max_limit = most(block.max_limit, limit);
    block.deepest = most(block.deepest, block.depth[i]);
    const int begin = most(i * g.group - block.first_row, 0);
    const int end = least((i + 1) * g.group - block.first_row, block.rows);
    for (int lane = begin; lane < end; ++lane) block.limit[lane] = limit;
    for_each_ancestor(p, block.b, i, [&](int j) {
      if (!in_window(p, block.depth[j], block.depth[i])) return;
      uint16_t* bits = block.visible + int64_t(j) * g.block_tiles;
      for (int lane = begin; lane < end; ++lane) bits[lane / kLanes] |= uint16_t(1u << (lane % kLanes));
    });
  }
  return true;
}

// The chunk at `first`; false if no row of the block sees a key of it.
static bool describe(Chunk& chunk, Block& block, const Geometry& g, const CacheRows& k, const CacheRows& v,
                     int64_t first) {
  chunk.first = first;
  chunk.prefix = int(least<int64_t>(most<int64_t>(block.seqlen - first, 0), kChunk));
  if (chunk.prefix > 0 && first + chunk.prefix - 1 <= block.min_limit) chunk.prefix = 0;
  chunk.padded = int(round_up(chunk.prefix, 32));
  chunk.uniform = block.max_limit < first;
  chunk.nodes = 0;
  chunk.node = block.list;
  chunk.k_row = block.k_row;
  chunk.v_row = block.v_row;
  if (first + kChunk > block.seqlen) {
    for (int j = 0; j <= block.last_node; ++j) {
      if ((block.seqlen + int64_t(block.depth[j])) / kChunk != first / kChunk) continue;
      unsigned seen = 0;
      for (int t = 0; t < block.tiles; ++t) seen |= block.visible[int64_t(j) * g.block_tiles + t];
      if (!seen) continue;
      block.index[j] = chunk.nodes;
      block.list[chunk.nodes++] = j;
    }
  }
  if (chunk.prefix + chunk.nodes == 0) return false;
  for (int x = 0; x < chunk.prefix; ++x) {
    chunk.k_row[x] = k.row(first + x);
    chunk.v_row[x] = v.row(first + x);
  }
  for (int x = chunk.prefix; x < chunk.padded; ++x) chunk.k_row[x] = chunk.v_row[x] = nullptr;
  for (int x = 0; x < chunk.nodes; ++x) {
    chunk.k_row[chunk.padded + x] = k.row(int64_t(block.seqlen) + chunk.node[x]);
    chunk.v_row[chunk.padded + x] = v.row(int64_t(block.seqlen) + chunk.node[x]);
  }
  for (int x = chunk.padded + chunk.nodes; x < int(round_up(chunk.padded + chunk.nodes, 32)); ++x) {
    chunk.k_row[x] = chunk.v_row[x] = nullptr;
  }
  return true;
}

TRANCHE_INLINE float score_factor(const TreeAttentionParams& p, int head_kv) {
  return p.k_scale ? p.scale * p.k_scale[head_kv] : p.scale;
}

// Scores to softcap * log2e * tanh(score / softcap), and what they must be multiplied with afterwards.
// `factor` is not negative: its sign is folded into the queries.
TRANCHE_INLINE float apply_softcap(const TreeAttentionParams& p, float factor, float* scores, int keys) {
  if (p.softcap == 0.0f) return factor * kLog2e;
  const Vec inner = vset(factor / p.softcap), outer = vset(p.softcap * kLog2e);
  for (int i = 0; i < keys * kLanes; i += kWidth) {
    vstore(scores + i, vmul(outer, vtanh(vmul(vload(scores + i), inner))));
  }
  return 1.0f;
}

TRANCHE_INLINE Mask node_mask(const Block& block, const Geometry& g, int j, int tile, int lane) {
  return mask_of_bits(block.visible[int64_t(j) * g.block_tiles + tile] >> lane & ((1u << kWidth) - 1u));
}

// The largest of the scores [key][16] that each of the rows at `lane` of `tile` sees.
TRANCHE_INLINE Vec visible_max(const Chunk& chunk, const Block& block, const Geometry& g, int tile, int lane,
                               const float* scores) {
  const Vec lowest = vset(-kInf);
  Vec m0 = lowest, m1 = lowest, m2 = lowest, m3 = lowest;
  const float* s = scores + lane;
  if (chunk.uniform) {
    int x = 0;
    for (; x + 4 <= chunk.prefix; x += 4) {
      m0 = vmax(vload(s + x * kLanes), m0);
      m1 = vmax(vload(s + (x + 1) * kLanes), m1);
      m2 = vmax(vload(s + (x + 2) * kLanes), m2);
      m3 = vmax(vload(s + (x + 3) * kLanes), m3);
    }
    for (; x < chunk.prefix; ++x) m0 = vmax(vload(s + x * kLanes), m0);
  } else {
    const int32_t* limit = block.limit + tile * kLanes + lane;
    for (int x = 0; x < chunk.prefix; ++x) {
      m0 = vmax(vselect(mask_above(int32_t(chunk.first + x), limit), vload(s + x * kLanes), lowest), m0);
    }
  }
  for (int x = 0; x < chunk.nodes; ++x) {
    const Mask mask = node_mask(block, g, chunk.node[x], tile, lane);
    m1 = vmax(vselect(mask, vload(s + (chunk.padded + x) * kLanes), lowest), m1);
  }
  return vmax(vmax(m0, m1), vmax(m2, m3));
}

// A maximum that can be subtracted: 0 where no key has been seen.
TRANCHE_INLINE Vec finite_max(Vec m) { return vselect(veq(m, vset(-kInf)), vset(0.0f), m); }

// The nearest whole number; from 2^22 on x itself, which is whole or nearly.
TRANCHE_INLINE Vec whole_number(Vec x) {
  const Vec magic = vset(12582912.0f);  // 1.5 * 2^23
  return vselect(vlt(vabs(x), vset(4194304.0f)), vsub(vadd(x, magic), magic), x);
}

// What weights are taken relative to, given the largest score of a chunk (unscaled): the running maximum, but
// it follows only rises of more than kSlack powers of two, so that the output is seldom rescaled. A weight is
// then at most 2^kSlack, which costs no precision. It is a whole number: rescaling is exact, and so is its
// share of lse. Decided per row. Returns what sum and output must be
// multiplied with, exactly 1 where the base stays.
TRANCHE_INLINE Vec advance_max(float* running, Vec chunk_max, float factor) {
  constexpr float kSlack = 8.0f;
  const Vec old = vload(running), lowest = vset(-kInf);
  const Vec scaled = vselect(veq(chunk_max, lowest), lowest, whole_number(vmul(chunk_max, vset(factor))));
  const Vec now = vselect(vlt(vadd(old, vset(kSlack)), scaled), scaled, old);
  vstore(running, now);
  // Before the first key sum and output are 0.
  const Mask stays = veq(now, old), first = veq(old, lowest);
  return vselect(stays, vset(1.0f), vselect(first, vset(1.0f), vexp2<6>(vsub(old, now))));
}

// total += part, in the order of the calls.
static void merge(const Partial& total, const Partial& part, int tiles, int padded_dim) {
  for (int t = 0; t < tiles; ++t) {
    for (int lane = 0; lane < kLanes; lane += kWidth) {
      const int at = t * kLanes + lane;
      const Vec m_total = vload(total.max + at), m_part = vload(part.max + at);
      const Vec now = vmax(m_part, m_total), base = finite_max(now);
      const Vec w_total = vselect(veq(now, m_total), vset(1.0f), vexp2<6>(vsub(m_total, base)));
      const Vec w_part = vselect(veq(now, m_part), vset(1.0f), vexp2<6>(vsub(m_part, base)));
      vstore(total.max + at, now);
      vstore(total.sum + at, vfma(vload(part.sum + at), w_part, vmul(vload(total.sum + at), w_total)));
      float* o = total.out + int64_t(t) * padded_dim * kLanes + lane;
      const float* add = part.out + int64_t(t) * padded_dim * kLanes + lane;
      for (int d = 0; d < padded_dim; ++d, o += kLanes, add += kLanes) {
        vstore(o, vfma(vload(add), w_part, vmul(vload(o), w_total)));
      }
    }
  }
}

template <class T>
TRANCHE_INLINE T* out_row(const TreeAttentionParams& p, int b, int node, int head) {
  return static_cast<T*>(p.out) + b * p.out_stride[0] + node * p.out_stride[1] + head * p.out_stride[2];
}

// Normalises and writes a block's rows.
template <class T>
static void finish(const TreeAttentionParams& p, const Geometry& g, const Block& block,
                   const Partial& total) {
  const float v_scale = p.v_scale ? p.v_scale[block.head_kv] : 1.0f;
  for (int t = 0; t < block.tiles; ++t) {
    float factor[kLanes], divisor[kLanes];  // of the accumulated values
    T* row[kLanes];
    const int lanes = least(block.rows - t * kLanes, kLanes);
    for (int lane = 0; lane < lanes; ++lane) {
      const int r = block.first_row + t * kLanes + lane, node = r / g.group;
      const int head = block.head_kv * g.group + r % g.group;
      const float m = total.max[t * kLanes + lane], l = total.sum[t * kLanes + lane];
      row[lane] = out_row<T>(p, block.b, node, head);
      double denominator = l, numerator = 1.0;
      if (p.sinks) {
        const double sink = p.sinks[head] * kLog2eF64, top = sink > m ? sink : m;
        if (top > -kInf) {
          numerator = __builtin_exp2(m - top);
          denominator = l * numerator + __builtin_exp2(sink - top);
        }
      }
      factor[lane] = l == 0.0f ? 0.0f : float(numerator * v_scale);
      divisor[lane] = l == 0.0f ? 1.0f : float(denominator);
      if constexpr (!__is_same(T, float)) factor[lane] /= divisor[lane];
      if (p.lse) {
        const float lse = l == 0.0f ? -kInf : float(m / kLog2eF64 + __builtin_log(double(l)));
        p.lse[(int64_t(block.b) * p.nodes + node) * p.heads_q + head] = lse;
      }
    }
    // float32 divides: its rounding is what could be seen. The sum with 0 turns -0 into 0, which is what a
    // row's bits could otherwise depend on.
    const float* o = total.out + int64_t(t) * g.padded_dim * kLanes;
    for (int d = 0; d < p.head_dim; d += 16) {
      const int width = least(p.head_dim - d, 16);
#if defined(__AVX512F__)
      __m512i a[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(o + (d + i) * kLanes);
      transpose16(a);
      __m512i rows[16];
      for (int i = 0; i < 16; ++i) rows[i] = a[i];
      for (int lane = 0; lane < lanes; ++lane) {
        Vec x = vmul(_mm512_castsi512_ps(rows[lane]), vset(factor[lane]));
        if constexpr (__is_same(T, float)) x = vdiv(x, vset(divisor[lane]));
        store16(row[lane] + d, vadd(x, vset(0.0f)), width);
      }
#else
      for (int lane = 0; lane < lanes; ++lane) {
        for (int i = 0; i < width; ++i) {
          float x = o[(d + i) * kLanes + lane] * factor[lane];
          if constexpr (__is_same(T, float)) x /= divisor[lane];
          row[lane][d + i] = from_float<T>(x + 0.0f);
        }
      }
#endif
    }
  }
}

// Rows past n_nodes.
template <class T>
static void clear_unused(const TreeAttentionParams& p, int b) {
  for (int i = node_count(p, b); i < p.nodes; ++i) {
    for (int head = 0; head < p.heads_q; ++head) {
      memset(out_row<T>(p, b, i, head), 0, sizeof(T) * size_t(p.head_dim));
      if (p.lse) p.lse[(int64_t(b) * p.nodes + i) * p.heads_q + head] = -kInf;
    }
  }
}

// Where a task begins to read.
struct Start {
  int b = 0, head_kv = 0;
  int64_t first = 0;
  int keys = 0;
};

TRANCHE_INLINE Start start_of(const TreeAttentionParams& p, const Geometry& g, int64_t task) {
  Start start;
  if (task >= g.tasks) return start;
  const int64_t triple = g.split ? task / g.segments : task;
  start.b = int(triple / g.blocks / p.heads_kv);
  start.head_kv = int(triple / g.blocks % p.heads_kv);
  const int64_t seqlen = committed(p, start.b);
  if (g.split) start.first = task % g.segments * kSegment;
  if (p.window > 0) start.first = most(start.first, (seqlen - p.window) / kChunk * kChunk);
  start.keys = int(least<int64_t>(most<int64_t>(seqlen - start.first, 0), kChunk));
  return start;
}

// A worker's memory: tables, partial results, and what the kernel takes.
template <class Kernel>
struct Worker {
  Block block;
  Partial total, part;
  Kernel kernel;

  Worker(const TreeAttentionParams& p, const Geometry& g, Arena& arena) : kernel(p, g) {
    block.take(arena, p, g);
    total = Partial::at(arena.take<float>(Partial::floats(g)), g);
    part = Partial::at(arena.take<float>(Partial::floats(g)), g);
    kernel.take(arena);
  }
  // The partial result of positions index * 2048 .. + 2047. `after` is what the worker will do next.
  void segment(const TreeAttentionParams& p, const Geometry& g, int index, const Partial& result,
               const Start& after) {
    const CacheRows k(p, p.k_cache, p.k_stride, Kernel::kElement, block.b, block.head_kv);
    const CacheRows v(p, p.v_cache, p.v_stride, Kernel::kElement, block.b, block.head_kv);
    const CacheRows k_after(p, p.k_cache, p.k_stride, Kernel::kElement, after.b, after.head_kv);
    const CacheRows v_after(p, p.v_cache, p.v_stride, Kernel::kElement, after.b, after.head_kv);
    const int row_bytes = p.head_dim * Kernel::kElement;
    Prefetch prefetch;
    result.clear(block.tiles, g.padded_dim);
    const int64_t begin = int64_t(index) * kSegment, last = int64_t(block.seqlen) + block.deepest;
    bool at_end = false;
    for (int64_t first = begin; first < begin + kSegment && first <= last; first += kChunk) {
      Chunk chunk;
      if (!describe(chunk, block, g, k, v, first)) continue;
      const int64_t next = first + kChunk;
      const bool more = next < block.seqlen && !(g.split && next == begin + kSegment);
      if (more) {
        prefetch.begin(k, v, next, int(least<int64_t>(block.seqlen - next, kChunk)), row_bytes);
      } else {
        prefetch.begin(k_after, v_after, after.first, at_end ? 0 : after.keys, row_bytes);
        at_end = true;
      }
      chunk.prefetch = &prefetch;
      kernel.chunk(block, chunk, result);
    }
  }
};

template <class Kernel>
TRANCHE_INLINE int64_t worker_bytes(const TreeAttentionParams& p, const Geometry& g) {
  Arena counter(nullptr);
  const Worker<Kernel> worker(p, g, counter);
  return round_up(counter.used(), 4096) + 256;  // the odd 256 keep workers out of each other's cache sets
}

template <class Kernel>
static size_t workspace_bytes(const TreeAttentionParams& p) {
  const Geometry g = geometry(p);
  if (g.tasks == 0) return 0;
  const int64_t partials =
      g.split ? round_up(g.tasks * Partial::floats(g) * int64_t(sizeof(float)), 4096) : 0;
  return size_t(partials + g.workers * worker_bytes<Kernel>(p, g));
}

template <class Kernel>
static void run(const TreeAttentionParams& p) {
  using T = typename Kernel::Query;
  const Geometry g = geometry(p);
  if (g.tasks == 0) return;
  float* partials = static_cast<float*>(p.workspace);
  const int64_t partial_bytes =
      g.split ? round_up(g.tasks * Partial::floats(g) * int64_t(sizeof(float)), 4096) : 0;
  char* scratch = static_cast<char*>(p.workspace) + partial_bytes;
  const int64_t stride = worker_bytes<Kernel>(p, g);

  // Workers take tasks as they become free; which worker takes which shows in no bit.
  int64_t next = 0;
  parallel_for(g.workers, [&](int64_t w) {
    Arena arena(scratch + w * stride);
    Worker<Kernel> worker(p, g, arena);
    [[maybe_unused]] typename Kernel::Session session;
    int64_t described = -1;
    bool in_use = false;
    const auto claim = [&] { return __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); };
    for (int64_t task = claim(), following; task < g.tasks; task = following) {
      following = claim();
      const Start after = start_of(p, g, following);
      const int64_t triple = g.split ? task / g.segments : task;
      if (triple != described) {
        in_use = describe(worker.block, p, g, triple);
        if (in_use) worker.kernel.begin(worker.block);
        described = triple;
      }
      if (!in_use) continue;
      if (g.split) {
        worker.segment(p, g, int(task % g.segments), Partial::at(partials + task * Partial::floats(g), g),
                       after);
        continue;
      }
      const int last = int((int64_t(worker.block.seqlen) + worker.block.deepest) / kSegment);
      worker.segment(p, g, 0, worker.total, after);
      for (int s = 1; s <= last; ++s) {
        worker.segment(p, g, s, worker.part, after);
        merge(worker.total, worker.part, worker.block.tiles, g.padded_dim);
      }
      finish<T>(p, g, worker.block, worker.total);
    }
  });
  if (g.split) {
    next = 0;
    parallel_for(g.workers, [&](int64_t w) {
      Arena arena(scratch + w * stride);
      Worker<Kernel> worker(p, g, arena);
      for (;;) {
        const int64_t triple = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        if (triple >= g.heads) break;
        if (!describe(worker.block, p, g, triple)) continue;
        const int last = int((int64_t(worker.block.seqlen) + worker.block.deepest) / kSegment);
        float* memory = partials + triple * g.segments * Partial::floats(g);
        const Partial total = Partial::at(memory, g);
        for (int s = 1; s <= last; ++s) {
          merge(total, Partial::at(memory + s * Partial::floats(g), g), worker.block.tiles, g.padded_dim);
        }
        finish<T>(p, g, worker.block, total);
      }
    });
  }
  for (int b = 0; b < p.batch; ++b) clear_unused<T>(p, b);
}

}  // namespace tranche::cpu::TRANCHE_ISA
