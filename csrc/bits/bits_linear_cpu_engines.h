// The three arithmetics of bits_linear. An engine turns a unit of weights (16 rows of 4 inputs, as bytes
// W + 128) into `kSteps` vectors for each vector of bytes, and multiplies one with a word of x: the inputs
// that the step is about, the same for all rows. kBlockUnits units are one chain of additions, which is then
// added to a total: the shorter, the smaller the error of a sum of floats. With kAnyOrder chains may be cut
// elsewhere.
//
// From kMeetsFrom planes on a single row of floats meets weights in registers, as they are decoded. With
// fewer, or where a weight takes many operations, the chains of sums are longer than what a processor looks
// ahead: bytes wait in L1 meanwhile. Integers, whose sums have no order, always meet so, by way of dot_tiles.
#pragma once

#include "bits/bits_linear_cpu.h"

namespace tranche::cpu::TRANCHE_ISA {

constexpr int64_t kFloatRunTiles = 8;
static_assert(kFloatRunTiles * kTileInputs % kBf16Block == 0 && kBf16Block % kFloatBlock == 0,
              "runs are of blocks");

constexpr int kNever = 9;  // planes

// Integer activations: dot products of four bytes. A word is four codes.
struct IntegerEngine {
  using Sum = Bytes;
  using Weight = Bytes;
  using Input = FourBytes;
  static constexpr int kSteps = 1;
  static constexpr int64_t kRunTiles = 128;
  static constexpr int kBlockUnits = kRunTiles * kUnits;
  static constexpr bool kAnyOrder = true;
  static constexpr bool kPrepares = false;  // weights are used as they are decoded
  static constexpr int kMeetsFrom = kNever;

  explicit IntegerEngine(const PackedWeight&) {}
  Weight weights(Bytes unit, int) const { return unit; }
  static Weight load(const void* p) { return bload(p); }
  static Input input(uint32_t word) { return bspread(word); }
  static Sum multiply_add(Sum sum, Weight w, const Input& x) { return bdot(sum, w, x); }
  static Sum zero() { return bset(0); }
  static void add_to(void* total, Sum sum) { bstore(total, badd(bload(total), sum)); }
};

// Float activations by FMAs. A word is one float.
struct FloatEngine {
  using Sum = Vec;
  using Weight = Vec;
  using Input = Vec;
  static constexpr int kSteps = 4;
  static constexpr int64_t kRunTiles = kFloatRunTiles;
  static constexpr int kBlockUnits = kFloatBlock / 4;
  static constexpr bool kAnyOrder = false;
  static constexpr bool kPrepares = true;
  static constexpr int kMeetsFrom = 7;

  explicit FloatEngine(const PackedWeight&) {}
  // Byte j of every lane, less 128, as float: the byte becomes the low mantissa of 2^23.
  Weight weights(Bytes unit, int j) const {
    const Bytes shifted = j == 0 ? unit : bright(unit, 8 * j);
    return vsub(bfloat(bselect(bset(0xffu), shifted, bset(0x4b000000u))), vset(8388608.0f + 128.0f));
  }
  static Weight load(const void* p) { return vload(static_cast<const float*>(p)); }
  static Input input(uint32_t word) { return vset(bits_float(word)); }
  static Sum multiply_add(Sum sum, Weight w, const Input& x) { return vfma(w, x, sum); }
  static Sum zero() { return vset(0.0f); }
  static void add_to(void* total, Sum sum) {
    float* to = static_cast<float*>(total);
    vstore(to, vadd(vload(to), sum));
  }
};

#if defined(__AVX512BF16__)

// bf16 activations by dot products of two: a word is the inputs j and j + 2 of a unit, j = 0 or 1, since even
// and odd bytes part most easily. Codes of 8 bits are exact in bf16.
template <bool few_bits>
struct Bf16Engine {
  using Sum = Vec;
  using Weight = Bytes;
  using Input = Bytes;
  static constexpr int kSteps = 2;
  static constexpr int64_t kRunTiles = kFloatRunTiles;
  static constexpr int kBlockUnits = kBf16Block / 4;
  static constexpr bool kAnyOrder = false;
  static constexpr bool kPrepares = true;
  static constexpr int kMeetsFrom = few_bits ? 3 : kNever;
  static constexpr int kMostBitsOfTable = 5;  // what an index into 32 words holds

  explicit Bf16Engine(const PackedWeight&) {
    alignas(64) uint16_t words[32];
    for (int i = 0; i < 32; ++i) words[i] = uint16_t(float_bits(float(8 * i - 128)) >> 16);
    table_ = bload(words);
  }
  Weight weights(Bytes unit, int j) const {
    if constexpr (few_bits) {  // the index is what the word's low five bits say
      return _mm512_permutexvar_epi16(_mm512_srli_epi16(unit, j == 0 ? 3 : 11), table_);
    } else {
      const Bytes low = float_of_byte(j == 0 ? unit : bright(unit, 8));
      const Bytes high = float_of_byte(bright(unit, j == 0 ? 16 : 24));
      return bselect(bset(0xffff0000u), high, bright(low, 16));
    }
  }
  static Weight load(const void* p) { return bload(p); }
  static Input input(uint32_t word) { return bset(word); }
  static Sum multiply_add(Sum sum, Weight w, const Input& x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
  }
  static Sum zero() { return vset(0.0f); }
  static void add_to(void* total, Sum sum) { FloatEngine::add_to(total, sum); }

 private:
  static Bytes float_of_byte(Bytes byte) {
    const Vec large = bfloat(bselect(bset(0xffu), byte, bset(0x4b000000u)));
    return _mm512_castps_si512(vsub(large, vset(8388608.0f + 128.0f)));
  }
  Bytes table_;
};

#endif

}  // namespace tranche::cpu::TRANCHE_ISA
