// The loops of bits_linear: weights are decoded run by run, each run is multiplied with all rows of x, and
// what a run adds up to is added to totals in memory. A row of x meets the same operations in the same order
// whatever the other rows are.
#pragma once

#include "bits/bits_linear_cpu_engines.h"

namespace tranche::cpu::TRANCHE_ISA {

// Chains of additions that are at work at once, so that their sums fill the registers.
constexpr int chains(int rows) {
#if defined(__AVX512F__)
  return rows <= 4 ? 4 : 2;
#else
  return rows == 1 && kParts <= 2 ? 2 : 1;
#endif
}
constexpr int kStepTiles = 4;        // rows of tiles that a thread takes at a time
constexpr int64_t kRowChunk = 1024;  // rows of x whose totals are kept meanwhile

// Where the chains that are at work at once lie. For many rows of x they are of as many rows of tiles, and a
// word of x serves them all. For few rows, where reading the weights is what takes time, they follow one
// another in one row of tiles: weights are read in the order in which they lie, and nothing else comes near
// the speed of the memory.
enum class Order { down, along };
constexpr int64_t kLineTiles = 32;  // decoded at a time in a row of tiles

TRANCHE_INLINE Order order_of(int64_t padded_rows) {
  return padded_rows <= kMostRows ? Order::along : Order::down;
}
constexpr int step_tiles(Order order) { return order == Order::along ? 1 : kStepTiles; }

// Adds to the totals[chain][row of x][16], or to totals[row of x][16] in the order of the chains, `units`
// units of each of `width` chains times `rows` rows of x. x is what meets the first.
template <class Engine, Order order, bool prepared, int width, int rows>
TRANCHE_INLINE void multiply_units(const Engine& engine, const uint8_t* const* weights, int64_t units,
                                   const uint32_t* x, int64_t stride, uint32_t* totals, int64_t tile_stride) {
  // Every loop over an array of registers is unrolled, or the array would live in memory.
  typename Engine::Sum sum[width][rows][kParts];
#pragma GCC unroll 4
  for (int o = 0; o < width; ++o) {
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m) {
#pragma GCC unroll 4
      for (int i = 0; i < kParts; ++i) sum[o][m][i] = Engine::zero();
    }
  }
  for (int64_t u = 0; u < units; ++u) {
#pragma GCC unroll 4
    for (int j = 0; j < Engine::kSteps; ++j) {
      typename Engine::Weight w[width][kParts];
#pragma GCC unroll 4
      for (int o = 0; o < width; ++o) {
#pragma GCC unroll 4
        for (int i = 0; i < kParts; ++i) {
          const int part = i * int(sizeof(Bytes));
          w[o][i] = prepared ? Engine::load(weights[o] + (u * Engine::kSteps + j) * 64 + part)
                             : engine.weights(bload(weights[o] + u * 64 + part), j);
        }
      }
#pragma GCC unroll 8
      for (int m = 0; m < rows; ++m) {
        const uint32_t* word = x + m * stride + u * Engine::kSteps + j;
        typename Engine::Input input = Engine::input(*word);
#pragma GCC unroll 4
        for (int o = 0; o < width; ++o) {
          if (order == Order::along && o > 0) input = Engine::input(word[o * units * Engine::kSteps]);
#pragma GCC unroll 4
          for (int i = 0; i < kParts; ++i) {
            sum[o][m][i] = Engine::multiply_add(sum[o][m][i], w[o][i], input);
            keep_in_register(sum[o][m][i]);
          }
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int o = 0; o < width; ++o) {
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m) {
#pragma GCC unroll 4
      for (int i = 0; i < kParts; ++i) {
        uint32_t* total = totals + (order == Order::down ? o * tile_stride : 0) + m * kTileRows;
        Engine::add_to(total + i * int(sizeof(Bytes)) / 4, sum[o][m][i]);
      }
    }
  }
}

// `width` rows of tiles at once, each block of inputs a chain in each.
template <class Engine, bool prepared, int width, int rows>
static void multiply_down(const Engine& engine, const uint8_t* const* weights, int64_t units,
                          const uint32_t* x, int64_t stride, uint32_t* totals, int64_t tile_stride) {
  const uint8_t* from[width];
  for (int64_t u = 0; u < units; u += Engine::kBlockUnits) {
    const int64_t left = units - u, length = left < Engine::kBlockUnits ? left : Engine::kBlockUnits;
    for (int o = 0; o < width; ++o) from[o] = weights[o] + u * 64 * (prepared ? Engine::kSteps : 1);
    multiply_units<Engine, Order::down, prepared, width, rows>(engine, from, length, x + u * Engine::kSteps,
                                                               stride, totals, tile_stride);
  }
}

// One row of tiles, `width` blocks of its inputs at once. Integers may be cut anywhere.
template <class Engine, int rows>
static void multiply_along(const Engine& engine, const uint8_t* weights, int64_t units, const uint32_t* x,
                           int64_t stride, uint32_t* totals) {
  constexpr int kChains = chains(rows);
  static_assert(kUnits % kChains == 0);
  const int64_t length = Engine::kAnyOrder ? units / kChains : Engine::kBlockUnits;
  const uint8_t* from[kChains];
  int64_t u = 0;
  for (; u + kChains * length <= units; u += kChains * length) {
    for (int o = 0; o < kChains; ++o) from[o] = weights + (u + o * length) * 64;
    multiply_units<Engine, Order::along, false, kChains, rows>(engine, from, length, x + u * Engine::kSteps,
                                                               stride, totals, 0);
  }
  for (; u < units; u += length) {
    from[0] = weights + u * 64;
    multiply_units<Engine, Order::along, false, 1, rows>(
        engine, from, length < units - u ? length : units - u, x + u * Engine::kSteps, stride, totals, 0);
  }
}

// Some rows of tiles, decoded (and prepared) a run at a time.
struct Run {
  const uint8_t* weights[kStepTiles];
  int64_t units;
};

template <class Engine, Order order, bool prepared, int rows>
static void multiply_tiles(const Engine& engine, const Run& run, int count, const uint32_t* x, int64_t stride,
                           uint32_t* totals, int64_t tile_stride) {
  if constexpr (order == Order::along) {
    multiply_along<Engine, rows>(engine, run.weights[0], run.units, x, stride, totals);
  } else {
    constexpr int kWide = chains(rows);
    int o = 0;
    for (; o + kWide <= count; o += kWide) {
      multiply_down<Engine, prepared, kWide, rows>(engine, run.weights + o, run.units, x, stride,
                                                   totals + o * tile_stride, tile_stride);
    }
    for (; o < count; ++o) {
      multiply_down<Engine, prepared, 1, rows>(engine, run.weights + o, run.units, x, stride,
                                               totals + o * tile_stride, tile_stride);
    }
  }
}

template <class Engine, Order order, bool prepared>
static void multiply_rows(const Engine& engine, const Run& run, int count, const uint32_t* x, int64_t stride,
                          int64_t rows, uint32_t* totals, int64_t tile_stride) {
  for (int64_t first = 0; first < rows;) {
    const int pass = pass_rows(rows - first);
    const uint32_t* from = x + first * stride;
    uint32_t* to = totals + first * kTileRows;
    switch (pass) {
      case 1:
        multiply_tiles<Engine, order, prepared, 1>(engine, run, count, from, stride, to, tile_stride);
        break;
      case 2:
        multiply_tiles<Engine, order, prepared, 2>(engine, run, count, from, stride, to, tile_stride);
        break;
      case 4:
        multiply_tiles<Engine, order, prepared, 4>(engine, run, count, from, stride, to, tile_stride);
        break;
      default:
        multiply_tiles<Engine, order, prepared, kMostRows>(engine, run, count, from, stride, to, tile_stride);
    }
    first += pass;
  }
}

template <class Engine>
static void prepare_units(const Engine& engine, const uint8_t* bytes, int64_t units, uint8_t* to) {
  for (int64_t u = 0; u < units; ++u) {
#pragma GCC unroll 4
    for (int j = 0; j < Engine::kSteps; ++j) {
#pragma GCC unroll 4
      for (int i = 0; i < kParts; ++i) {
        const auto w = engine.weights(bload(bytes + 64 * u + i * int(sizeof(Bytes))), j);
        __builtin_memcpy(to + (u * Engine::kSteps + j) * 64 + i * int(sizeof(Bytes)), &w, sizeof w);
      }
    }
  }
}

// What a thread keeps while it works on some rows of tiles.
struct Scratch {
  uint8_t* bytes;     // [step_tiles][a run] decoded
  uint8_t* prepared;  // [step_tiles][a run] as the engine wants them, where many rows of x are worth that
  uint32_t* totals;   // [step_tiles][rows][16] of one group: integers or floats
  float* y;           // [step_tiles][rows][16]
  int64_t rows;       // at a time, padded
};

template <class Engine>
constexpr int64_t run_bytes(Order order) {
  return (order == Order::along ? kLineTiles : Engine::kRunTiles) * kTileBytes8;
}

// Where each array ends: those of Scratch, in their order.
struct ScratchEnds {
  int64_t bytes, prepared, totals, y;
};

template <class Engine>
TRANCHE_INLINE ScratchEnds scratch_ends(int64_t padded_rows) {
  const Order order = order_of(padded_rows);
  const int64_t rows = padded_rows < kRowChunk ? padded_rows : kRowChunk, tiles = step_tiles(order);
  const bool prepares = Engine::kPrepares && order == Order::down;
  ScratchEnds ends{};
  ends.bytes = tiles * run_bytes<Engine>(order);
  ends.prepared = ends.bytes * (1 + (prepares ? Engine::kSteps : 0));
  ends.totals = ends.prepared + 64 * tiles * rows;
  ends.y = ends.totals + 64 * tiles * rows;
  return ends;
}

template <class Engine>
TRANCHE_INLINE Scratch scratch_of(uint8_t* memory, int64_t padded_rows) {
  const ScratchEnds ends = scratch_ends<Engine>(padded_rows);
  Scratch s{};
  s.bytes = memory;
  s.prepared = memory + ends.bytes;
  s.totals = reinterpret_cast<uint32_t*>(memory + ends.prepared);
  s.y = reinterpret_cast<float*>(memory + ends.totals);
  s.rows = padded_rows < kRowChunk ? padded_rows : kRowChunk;
  return s;
}

// Rows [first, first + rows) of x and `count` rows of tiles from `row_tile` on.
template <class Engine, Order order>
static void multiply_group(const BitsLinearParams& p, const Activations& x, const Engine& engine,
                           const Scratch& s, int64_t group, int64_t row_tile, int count, int64_t first,
                           int64_t rows) {
  constexpr int64_t kTiles = order == Order::along ? kLineTiles : Engine::kRunTiles;
  const int64_t tiles = p.groups == 1 ? p.w.input_tiles : p.w.in_features / p.groups / kTileInputs;
  const int64_t stride = x.padded_inputs / 4 * Engine::kSteps;
  constexpr bool kCanPrepare = order == Order::down && Engine::kPrepares;
  const bool prepare = kCanPrepare && rows > kMostRows;
  __builtin_memset(s.totals, 0, size_t(64 * count * s.rows));
  const int64_t begin = group * tiles, end = begin + tiles;
  const uint32_t* of_group =
      static_cast<const uint32_t*>(x.x) + first * stride + begin * kUnits * Engine::kSteps;
  if (Engine::kAnyOrder && order == Order::along && rows == 1 && p.w.planes > 0) {
    return dot_tiles(p.w, row_tile, begin, end, of_group, s.totals);
  }
  for (int64_t t = begin; t < end; t += kTiles) {
    const int64_t run_end = t + kTiles < end ? t + kTiles : end;
    // What is read next: of these rows of tiles, or of those after them.
    const bool leaves = run_end == p.w.input_tiles;
    const int64_t ahead = order == Order::along ? tiles_ahead(p.w.planes)
                          : leaves              ? count * p.w.input_tiles - t
                                                : kTiles;
    Run run{};
    run.units = (run_end - t) * kUnits;
    for (int o = 0; o < count; ++o) {
      run.weights[o] =
          decode_tiles(p.w, row_tile + o, t, run_end, ahead, s.bytes + o * run_bytes<Engine>(order));
      if (prepare) {
        uint8_t* to = s.prepared + o * Engine::kSteps * run_bytes<Engine>(order);
        prepare_units(engine, run.weights[o], run.units, to);
        run.weights[o] = to;
      }
    }
    const uint32_t* from = of_group + (t - begin) * kUnits * Engine::kSteps;
    const auto multiply =
        prepare ? multiply_rows<Engine, order, kCanPrepare> : multiply_rows<Engine, order, false>;
    multiply(engine, run, count, from, stride, rows, s.totals, s.rows * kTileRows);
  }
}

#if defined(__AVX512F__)
// Tiles [begin, end) of a row of tiles times one row of x, of which x is what meets the first: adds to the
// totals of 16 outputs. Weights meet x as they are decoded, and in registers; the chains are those of
// multiply_along.
template <class R, class Engine>
static void meet_run(const Engine& engine, const Streams& from, int64_t begin, int64_t end, Rounding rounding,
                     const uint32_t* x, uint32_t* totals) {
  constexpr int64_t kBlockTiles = Engine::kBlockUnits / kUnits;
  const auto meet = [&](int64_t t, typename Engine::Sum& sum) {
    prefetch_tile<R>(from, t + tiles_ahead(R::planes));
    const uint32_t* words = x + (t - begin) * kUnits * Engine::kSteps;
    decode_tile<R>(from, t, rounding, [&](int unit, int, Bytes w) {
#pragma GCC unroll 4
      for (int j = 0; j < Engine::kSteps; ++j) {
        const typename Engine::Input input = Engine::input(words[unit * Engine::kSteps + j]);
        sum = Engine::multiply_add(sum, engine.weights(w, j), input);
      }
    });
  };
  constexpr int kChains = chains(1);
  int64_t t = begin;
  for (; t + kChains * kBlockTiles <= end; t += kChains * kBlockTiles) {
    typename Engine::Sum sum[kChains];
#pragma GCC unroll 4
    for (int o = 0; o < kChains; ++o) sum[o] = Engine::zero();
    for (int64_t i = 0; i < kBlockTiles; ++i) {
#pragma GCC unroll 4
      for (int o = 0; o < kChains; ++o) meet(t + o * kBlockTiles + i, sum[o]);
    }
#pragma GCC unroll 4
    for (int o = 0; o < kChains; ++o) Engine::add_to(totals, sum[o]);
  }
  for (; t < end; t += kBlockTiles) {
    typename Engine::Sum sum = Engine::zero();
    for (int64_t i = t; i < end && i < t + kBlockTiles; ++i) meet(i, sum);
    Engine::add_to(totals, sum);
  }
}

// What multiply_group does, for one row of x and one row of tiles.
template <class Engine>
static void meet_group(const BitsLinearParams& p, const Activations& x, const Engine& engine,
                       const Scratch& s, int64_t group, int64_t row_tile, int64_t first) {
  const int64_t tiles = p.groups == 1 ? p.w.input_tiles : p.w.in_features / p.groups / kTileInputs;
  const int64_t stride = x.padded_inputs / 4 * Engine::kSteps, begin = group * tiles;
  const uint32_t* of_group =
      static_cast<const uint32_t*>(x.x) + first * stride + begin * kUnits * Engine::kSteps;
  __builtin_memset(s.totals, 0, 64);
  with_reading(p.w, [&](auto reading) {
    using R = decltype(reading);
    if constexpr (R::planes >= Engine::kMeetsFrom) {
      meet_run<R>(engine, streams_of(p.w, row_tile * p.w.input_tiles), begin, begin + tiles,
                  rounding_of_bits(p.w.bits), of_group, s.totals);
    }
  });
}
#endif

// A group's totals, scaled, go to y.
static void scale_group(const BitsLinearParams& p, const Activations& x, const Scratch& s, int64_t group,
                        int64_t row_tile, int count, int64_t first, int64_t rows) {
  for (int o = 0; o < count; ++o) {
    float scale[16];
    load_scales(p, row_tile + o, group, scale);
    for (int64_t m = 0; m < rows; ++m) {
      const uint32_t* totals = s.totals + (o * s.rows + m) * kTileRows;
      float* y = s.y + (o * s.rows + m) * kTileRows;
      if (p.kind == LinearKind::weight_only) {
        add_float_group(totals, scale, y);
      } else {
        add_integer_group(totals, x.row_sum[(first + m) * p.groups + group], scale, y);
      }
    }
  }
}

static void finish(const BitsLinearParams& p, const Activations& x, const Scratch& s, int64_t row_tile,
                   int count, int64_t first, int64_t rows) {
  for (int o = 0; o < count; ++o) {
    float bias[16];
    load_bias(p, row_tile + o, bias);
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t at = (o * s.rows + m) * kTileRows;
      if (p.kind == LinearKind::integers) {
        store_integers(p, first + m, row_tile + o, s.totals + at, x.row_sum[first + m]);
      } else {
        finish_row(p, first + m, row_tile + o, x.scale ? x.scale[first + m] : 1.0f, bias, s.y + at);
      }
    }
  }
}

template <class Engine, Order order>
TRANCHE_INLINE void multiply_or_meet(const BitsLinearParams& p, const Activations& x, const Engine& engine,
                                     const Scratch& s, int64_t group, int64_t row_tile, int count,
                                     int64_t first, int64_t rows) {
#if defined(__AVX512F__)
  if constexpr (order == Order::along && Engine::kMeetsFrom < kNever) {
    if (rows == 1 && p.w.planes >= Engine::kMeetsFrom) {
      return meet_group(p, x, engine, s, group, row_tile, first);
    }
  }
#endif
  multiply_group<Engine, order>(p, x, engine, s, group, row_tile, count, first, rows);
}

// All rows of x with the rows of tiles [row_tile, row_tile + count).
template <class Engine, Order order>
static void multiply_step(const BitsLinearParams& p, const Activations& x, const Engine& engine,
                          const Scratch& s, int64_t row_tile, int count) {
  for (int64_t first = 0; first < p.rows; first += s.rows) {
    const int64_t rows = p.rows - first < s.rows ? p.rows - first : s.rows;
    __builtin_memset(s.y, 0, size_t(64 * count * s.rows));
    for (int64_t g = 0; g < p.groups; ++g) {
      multiply_or_meet<Engine, order>(p, x, engine, s, g, row_tile, count, first, rows);
      if (p.kind != LinearKind::integers) scale_group(p, x, s, g, row_tile, count, first, rows);
    }
    finish(p, x, s, row_tile, count, first, rows);
  }
}

template <class Engine, Order order>
static void linear_in_order(const BitsLinearParams& p, const Activations& x) {
  constexpr int kStep = step_tiles(order);
  const Engine engine(p.w);
  share_row_tiles(p, kStep, x, scratch_ends<Engine>(x.padded_rows).y,
                  [&](int64_t begin, int64_t end, uint8_t* mine) {
                    const Scratch s = scratch_of<Engine>(mine, x.padded_rows);
                    for (int64_t row_tile = begin; row_tile < end; row_tile += kStep) {
                      const int count = int(end - row_tile < kStep ? end - row_tile : kStep);
                      multiply_step<Engine, order>(p, x, engine, s, row_tile, count);
                    }
                  });
}

template <class Engine>
static void linear_by_blocks(const BitsLinearParams& p, const Activations& x) {
  if (order_of(x.padded_rows) == Order::along) {
    linear_in_order<Engine, Order::along>(p, x);
  } else {
    linear_in_order<Engine, Order::down>(p, x);
  }
}

// Bytes that the workers need beside the activations.
template <class Engine>
static int64_t blocks_scratch(const BitsLinearParams& p, int64_t padded_rows) {
  return workers(p, step_tiles(order_of(padded_rows))) * scratch_ends<Engine>(padded_rows).y;
}

}  // namespace tranche::cpu::TRANCHE_ISA
