// The engines whose vectors run along k: fp32 columns by FMA for every instruction set, and bf16 columns by
// the dot products of AVX-512 BF16. Weights are read as they lie and converted in registers.
#pragma once

#include "moe/moe_engine_cpu.h"

namespace tranche::cpu::TRANCHE_ISA {

// More rows than columns: the rows lie in L1, and the columns, which pass by from L2, are the fewer lines.
#if defined(__AVX512F__)
constexpr int kBlockRows = 8, kBlockColumns = 3;  // 24 accumulators of 32 registers
constexpr int kRowColumns = 6;                    // that one row meets at once
#else
constexpr int kBlockRows = 4, kBlockColumns = 2;  // 8 of 16
constexpr int kRowColumns = kBlockColumns;
#endif

// Where weights are asked for. Each line is read once from memory: it need not drive out what L2 and L3 hold,
// and on Zen it best comes into L1 alone. Processors with AMX fetch half as fast that way, and lose the line
// when L1 needs room: they ask for L2.
#if defined(__AMX_BF16__)
constexpr int kWeightsLocality = 2;
#else
constexpr int kWeightsLocality = 0;
#endif

// fp32 columns: lane k % kWidth sums elements k, k + kWidth, ... by FMA.
struct FmaLanes {
  using Element = float;
  using Operand = Vec;
  static constexpr int kStep = kWidth;  // elements of k in an operand

  TRANCHE_INLINE Vec dot(Vec a, Vec b, Vec sum) { return vfma(a, b, sum); }
  TRANCHE_INLINE void store(Vec x, float* p) { vstore(p, x); }
  TRANCHE_INLINE Vec load(const float* p) { return vload(p); }
#if defined(__AVX512F__)
  TRANCHE_INLINE Vec load(const half* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  TRANCHE_INLINE Vec load(const bf16* p) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
  }
  TRANCHE_INLINE Vec load(const int8_t* p) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x));
  }
#elif defined(__AVX2__)
  TRANCHE_INLINE Vec load(const half* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  TRANCHE_INLINE Vec load(const bf16* p) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
  }
  TRANCHE_INLINE Vec load(const int8_t* p) {
    const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x));
  }
#else
  template <class W>
  TRANCHE_INLINE Vec load(const W* p) {
    return load_first(p, kStep);
  }
#endif

  // The first n elements, the others 0.
  template <class W>
  TRANCHE_INLINE Vec load_first(const W* p, int n) {
    float lanes[kWidth] = {};
    for (int i = 0; i < n; ++i) {
      if constexpr (__is_same(W, int8_t)) {
        lanes[i] = float(p[i]);
      } else {
        lanes[i] = to_float(p[i]);
      }
    }
    return vload(lanes);
  }

  TRANCHE_INLINE void pack(const float* from, float* to, int n) { memcpy(to, from, size_t(n) * 4); }
  template <class T>
  TRANCHE_INLINE void pack(const T* from, float* to, int n) {
    row_to_float(from, to, n);
  }
  TRANCHE_INLINE void put(const float* values, float* to) { memcpy(to, values, kTileRows * sizeof(float)); }
};

#if defined(__AVX512BF16__)
// bf16 columns: a lane sums pairs of k, two products at a time.
struct DotLanes {
  using Element = bf16;
  using Operand = __m512bh;
  static constexpr int kStep = 32;

  TRANCHE_INLINE Vec dot(__m512bh a, __m512bh b, Vec sum) { return _mm512_dpbf16_ps(sum, a, b); }
  TRANCHE_INLINE void store(__m512bh x, bf16* p) { __builtin_memcpy(p, &x, sizeof x); }
  TRANCHE_INLINE __m512bh load(const bf16* p) {
    __m512bh x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
  }
  TRANCHE_INLINE __m512bh load_first(const bf16* p, int n) {
    return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16((__mmask32(1) << n) - 1, p));
  }
  // exact: 8 bits of significand hold every int8
  TRANCHE_INLINE __m512bh widen(__m256i x) {
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(x)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(x, 1)));
    return _mm512_cvtne2ps_pbh(high, low);
  }
  TRANCHE_INLINE __m512bh load(const int8_t* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  TRANCHE_INLINE __m512bh load_first(const int8_t* p, int n) {
    return widen(_mm256_maskz_loadu_epi8((__mmask32(1) << n) - 1, p));
  }

  TRANCHE_INLINE void pack(const bf16* from, bf16* to, int n) { memcpy(to, from, size_t(n) * 2); }
  TRANCHE_INLINE void put(const float* values, bf16* to) { store16(to, vload(values), kTileRows); }
};
#endif

// What a block asks for on its way: lines of the rows that are read next, at every step of k.
struct LinesAhead {
  const char* first;
  int64_t stride;  // bytes, as is `advance`, of one step
  int64_t advance;
  int rows;  // so many lines at every step
};

// Elements k of consecutive rows (or columns), `stride` elements apart.
template <class E>
struct Slab {
  const E* first;
  int64_t stride;
};

// One operand of each row and column; of a partial one the first `left` elements of k.
template <class Lanes, class W, int kRows, int kColumns, bool kPartial>
TRANCHE_INLINE void multiply_step(Slab<W> w, Slab<typename Lanes::Element> x, int64_t k, int left,
                                  Vec (&acc)[kColumns][kRows]) {
  typename Lanes::Operand column[kColumns];
#pragma GCC unroll 6
  for (int c = 0; c < kColumns; ++c) column[c] = Lanes::load(x.first + c * x.stride + k);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const W* at = w.first + r * w.stride + k;
    typename Lanes::Operand row = kPartial ? Lanes::load_first(at, left) : Lanes::load(at);
#if defined(__AVX512F__)
    asm("" : "+v"(row));  // loaded once, not by each of the products
#endif
#pragma GCC unroll 6
    for (int c = 0; c < kColumns; ++c) acc[c][r] = Lanes::dot(row, column[c], acc[c][r]);
  }
}

// accumulators[c][r] += w[r] * x[c], lane by lane, for kRows rows and kColumns columns.
template <class Lanes, class W, int kRows, int kColumns>
TRANCHE_INLINE void multiply_block(Slab<W> w, Slab<typename Lanes::Element> x, int depth, bool first,
                                   const LinesAhead& ahead, float* accumulators) {
  Vec acc[kColumns][kRows];
#pragma GCC unroll 6
  for (int c = 0; c < kColumns; ++c) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      acc[c][r] = first ? vset(0.0f) : vload(accumulators + (c * kBlockRows + r) * kWidth);
    }
  }
  const int64_t whole = depth / Lanes::kStep * Lanes::kStep;
  const char* ask = ahead.first;
  for (int64_t k = 0; k < whole; k += Lanes::kStep, ask += ahead.advance) {
    const char* line = ask;
    for (int i = 0; i < ahead.rows; ++i, line += ahead.stride) {
      __builtin_prefetch(line, 0, kWeightsLocality);
    }
    multiply_step<Lanes, W, kRows, kColumns, false>(w, x, k, 0, acc);
  }
  if (whole < depth) multiply_step<Lanes, W, kRows, kColumns, true>(w, x, whole, int(depth - whole), acc);
#pragma GCC unroll 6
  for (int c = 0; c < kColumns; ++c) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) vstore(accumulators + (c * kBlockRows + r) * kWidth, acc[c][r]);
  }
}

// The sum of the lanes, by one fixed tree.
TRANCHE_INLINE void add_lanes(const float* const (&vectors)[16], float* sums) {
#if defined(__AVX512F__)
  Vec four[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vec a = vload(vectors[4 * i]), b = vload(vectors[4 * i + 1]);
    const Vec c = vload(vectors[4 * i + 2]), d = vload(vectors[4 * i + 3]);
    const __m512d ab = _mm512_castps_pd(vadd(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    const __m512d cd = _mm512_castps_pd(vadd(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
    four[i] =
        vadd(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
  }
  const Vec low =
      vadd(_mm512_shuffle_f32x4(four[0], four[1], 0x88), _mm512_shuffle_f32x4(four[0], four[1], 0xdd));
  const Vec high =
      vadd(_mm512_shuffle_f32x4(four[2], four[3], 0x88), _mm512_shuffle_f32x4(four[2], four[3], 0xdd));
  vstore(sums, vadd(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd)));
#else
  for (int i = 0; i < 16; ++i) {
    float lanes[kWidth];
    memcpy(lanes, vectors[i], sizeof lanes);
    for (int half = kWidth / 2; half > 0; half /= 2) {
      for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
    }
    sums[i] = lanes[0];
  }
#endif
}

template <class Lanes>
class LaneEngine {
 public:
  using Compute = float;
  using Element = typename Lanes::Element;
  struct Session {};
  static constexpr int kTilesTogether = 1;

  // From column to column: one line more than the depth, because columns (and rows) a power of two apart
  // would share the same few sets of the L1 cache.
  static int64_t padded(int depth) { return round_up(depth, kLine) + kLine; }
  static int64_t panel_bytes(int depth) { return kPanel * padded(depth) * int64_t(sizeof(Element)); }
  static int64_t scratch_bytes() {
    return kAccumulators * int64_t(sizeof(float)) + kBlockRows * kStagedStride * int64_t(sizeof(Element));
  }

  // Columns from 16 rows of memory; a null row is a column of zeros.
  template <class T>
  static void pack(const T* const (&rows)[kPanel], int depth, void* panel) {
    Element* to = static_cast<Element*>(panel);
    const int64_t pad = padded(depth);
    for (int c = 0; c < kPanel; ++c, to += pad) {
      const int filled = rows[c] ? depth : 0;
      if (filled) Lanes::pack(rows[c], to, filled);
      memset(to + filled, 0, size_t(pad - filled) * sizeof(Element));
    }
  }

  // Elements first_row..+15 of one column.
  static void put(void* panel, int depth, int column, int first_row, const float* values) {
    Lanes::put(values, static_cast<Element*>(panel) + column * padded(depth) + first_row);
  }

  // result[c][r] = <row first_row + r, column c>; rows beyond the matrix give 0. `next` is where the product
  // after this one will read, or null.
  //
  // kBlockRows rows at a time stay in L1 for a chunk of k while the columns pass by. Columns that all fit
  // beside one row make no second use of it: they take few rows at a time, which the processor reads as long
  // streams.
  template <class W>
  static void product(const Rows<W>& w, int first_row, const void* panels, int columns, float* result,
                      void* scratch, const W* next) {
    const int rows = least(w.rows - first_row, kTileRows);
    const Slab<Element> x{static_cast<const Element*>(panels), padded(w.columns)};
    float* acc = static_cast<float*>(scratch);
    int r = 0;
    for (; r + kBlockRows <= rows; r += kBlockRows) {
      const bool more = rows == kTileRows && r + kBlockRows < kTileRows;
      const W* after = more ? w.row(first_row + r + kBlockRows) : next;
      if (meet_at_once(columns, w.columns)) {
        for (int i = 0; i < kBlockRows; i += kStreams<W>) {
          const Slab<W> block{w.row(first_row + r + i), w.stride};
          multiply_rows<kStreams<W>, kRowColumns>(
              block, x, w.columns, columns, acc + i * kWidth,
              i + kStreams<W> < kBlockRows ? block.first + kStreams<W> * w.stride : after);
        }
      } else {
        const Slab<W> block{w.row(first_row + r), w.stride};
        multiply_rows<kBlockRows>(block, x, w.columns, columns, acc, after);
      }
      add<kBlockRows>(acc, columns, result + r);
    }
    for (; r < rows; ++r) {
      const W* nothing = nullptr;
      multiply_rows<1>(Slab<W>{w.row(first_row + r), w.stride}, x, w.columns, columns, acc, nothing);
      add<1>(acc, columns, result + r);
    }
    for (; r < kTileRows; ++r) {
      for (int c = 0; c < columns; ++c) result[c * kTileRows + r] = 0.0f;
    }
  }

 private:
  static constexpr int kLine = 64 / int(sizeof(Element));
  static constexpr int kChunk = 2048 / int(sizeof(Element));  // of k, in L1 for kBlockRows rows
  // As few rows as take up a cache line at each step, so that sums, each of which waits for the one before,
  // keep up with memory.
  template <class W>
  static constexpr int kStepBytes = Lanes::kStep * int(sizeof(W));
  template <class W>
  static constexpr int kStreams = kStepBytes<W> * kBlockRows < 64 ? kBlockRows : 64 / kStepBytes<W>;

  // Whether rows meet all columns in one pass, which few columns do, and some more as long as L1 holds all of
  // them beside the row.
  TRANCHE_INLINE bool meet_at_once(int columns, int depth) {
    constexpr int64_t kRoom = 32 << 10;
    return columns <= kBlockColumns ||
           (columns <= kRowColumns && columns * int64_t(depth) * int64_t(sizeof(Element)) <= kRoom);
  }

  // Such rows in equal parts of a page at most, and each part asks for the next one.
  template <class W>
  static int part_of_row(int depth) {
    constexpr int kPage = 4096 / int(sizeof(W));
    const int parts = (depth - 1) / kPage + 1;
    return int(round_up((depth + parts - 1) / parts, Lanes::kStep));
  }

  // Rows a power of two apart share sets of L1 and would drive one another out while many columns pass by:
  // such rows are copied first.
  static constexpr int kFewBlocks = 4, kStagedStride = kChunk + kLine;
  static constexpr int kColumnBlocks = (kGroupColumns + kBlockColumns - 1) / kBlockColumns;
  static constexpr int kBlock = kBlockRows * kBlockColumns * kWidth;
  static constexpr int kAccumulators = kColumnBlocks * kBlock;

  // The accumulators of kRows rows and all columns, of which kAtOnce go together; `next` as above.
  template <int kRows, int kAtOnce = kBlockColumns, class W>
  static void multiply_rows(Slab<W> w, Slab<Element> x, int depth, int columns, float* acc, const W* next) {
    const int blocks = (columns + kAtOnce - 1) / kAtOnce;
    const bool many = blocks > kFewBlocks;
    const int rows_at_once = blocks >= kRows ? 1 : (kRows + blocks - 1) / blocks;
    // sums go on where they stopped: the same bits
    const int chunk = blocks == 1 ? part_of_row<W>(depth) : kChunk;
    Element* staged = reinterpret_cast<Element*>(acc + kAccumulators);
    for (int k = 0; k < depth; k += chunk) {
      const int length = least(chunk, depth - k);
      const W* following = k + chunk >= depth ? next : w.first + k + chunk;
      int asked = following ? 0 : kRows;
      if (many) {
        for (int r = 0; r < kRows; ++r) stage(w.first + r * w.stride + k, length, staged + r * kStagedStride);
      }
      for (int c = 0; c < columns; c += kAtOnce) {
        const LinesAhead ahead{reinterpret_cast<const char*>(following + asked * w.stride),
                               w.stride * int64_t(sizeof(W)), Lanes::kStep * int64_t(sizeof(W)),
                               least(rows_at_once, kRows - asked)};
        asked += ahead.rows;
        const int width = least(columns - c, kAtOnce);
        const Slab<Element> of_x{x.first + c * x.stride + k, x.stride};
        float* sums = acc + c * kBlockRows * kWidth;
        if (many) {
          block<kRows>(width, Slab<Element>{staged, kStagedStride}, of_x, int(round_up(length, Lanes::kStep)),
                       k == 0, ahead, sums);
        } else {
          block<kRows>(width, Slab<W>{w.first + k, w.stride}, of_x, length, k == 0, ahead, sums);
        }
      }
    }
  }

  // A chunk of a row as the columns' type, zeros up to a whole step.
  template <class W>
  TRANCHE_INLINE void stage(const W* from, int n, Element* to) {
    int k = 0;
    for (; k + Lanes::kStep <= n; k += Lanes::kStep) Lanes::store(Lanes::load(from + k), to + k);
    if (k < n) Lanes::store(Lanes::load_first(from + k, n - k), to + k);
  }

  template <int kRows, class W>
  TRANCHE_INLINE void block(int columns, Slab<W> w, Slab<Element> x, int depth, bool first,
                            const LinesAhead& ahead, float* acc) {
    switch (columns) {
      case 1:
        return multiply_block<Lanes, W, kRows, 1>(w, x, depth, first, ahead, acc);
      case 2:
        return multiply_block<Lanes, W, kRows, 2>(w, x, depth, first, ahead, acc);
#if defined(__AVX512F__)
      case 3:
        return multiply_block<Lanes, W, kRows, 3>(w, x, depth, first, ahead, acc);
#endif
    }
    if constexpr (kRows * kRowColumns <= kBlockRows * kBlockColumns) {
      switch (columns) {
        case 4:
          return multiply_block<Lanes, W, kRows, 4>(w, x, depth, first, ahead, acc);
        case 5:
          return multiply_block<Lanes, W, kRows, 5>(w, x, depth, first, ahead, acc);
        case 6:
          return multiply_block<Lanes, W, kRows, 6>(w, x, depth, first, ahead, acc);
      }
    }
  }

  // result[c][0..kRows) of all columns, 16 sums at a time.
  template <int kRows>
  static void add(const float* acc, int columns, float* result) {
    constexpr int kTogether = 16 / kRows;
    for (int first = 0; first < columns; first += kTogether) {
      const float* vectors[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const int c = least(first + i / kRows, columns - 1);
        vectors[i] = acc + (c * kBlockRows + i % kRows) * kWidth;
      }
      float sums[16];
      add_lanes(vectors, sums);
      for (int i = 0; i < least(kTogether, columns - first); ++i) {
        memcpy(result + (first + i) * kTileRows, sums + i * kRows, kRows * sizeof(float));
      }
    }
  }
};

using FmaEngine = LaneEngine<FmaLanes>;
#if defined(__AVX512BF16__)
using DotEngine = LaneEngine<DotLanes>;
#endif

}  // namespace tranche::cpu::TRANCHE_ISA
