#include "core/isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tranche {
namespace {

#if defined(__x86_64__)

// The state components that the operating system saves for us.
uint64_t saved_state() {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27))) return 0;  // no OSXSAVE, so no xgetbv
  asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  return uint64_t(d) << 32 | a;
}

// Linux hands out tile registers on request only; the permission then holds for every thread of the process.
bool request_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa detect(Isa cap) {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return Isa::baseline;
  const bool fma = c & (1u << 12), f16c = c & (1u << 29);
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return Isa::baseline;
  const uint32_t leaf7_b = b, leaf7_c = c, leaf7_d = d;
  uint32_t leaf7_1_a = 0;
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) leaf7_1_a = a;

  const auto has = [](uint32_t word, int bit) { return (word >> bit & 1u) != 0; };
  const uint64_t state = saved_state();
  const bool saves_ymm = (state & 0x6) == 0x6, saves_zmm = (state & 0xe6) == 0xe6;
  const bool saves_tiles = (state & 0x60000) == 0x60000;

  if (cap < Isa::avx2 || !(saves_ymm && fma && f16c && has(leaf7_b, 5))) return Isa::baseline;
  const bool foundation = has(leaf7_b, 16) && has(leaf7_b, 17) && has(leaf7_b, 30) && has(leaf7_b, 31);
  const bool vnni = has(leaf7_c, 11), bf16 = has(leaf7_1_a, 5);
  if (cap < Isa::avx512 || !(saves_zmm && foundation && vnni && bf16)) return Isa::avx2;
  const bool tiles = has(leaf7_d, 22) && has(leaf7_d, 24) && has(leaf7_d, 25);
  if (cap < Isa::amx || !(saves_tiles && tiles && request_tiles())) return Isa::avx512;
  return Isa::amx;
}

#else

Isa detect(Isa) { return Isa::baseline; }

#endif

// TRANCHE_ISA can only lower the choice. Any other value, a misspelt one too, means no cap: an environment
// variable must not be able to stop a program that never asked for it.
Isa cap_from_environment() {
  const char* name = std::getenv("TRANCHE_ISA");
  for (Isa i : {Isa::baseline, Isa::avx2, Isa::avx512, Isa::amx}) {
    if (name && std::strcmp(name, isa_name(i)) == 0) return i;
  }
  return Isa::amx;
}

}  // namespace

const char* isa_name(Isa i) {
  switch (i) {
    case Isa::baseline:
      return "baseline";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::amx:
      return "amx";
  }
  return "unknown";
}

Isa isa() {
  static const Isa chosen = detect(cap_from_environment());
  return chosen;
}

}  // namespace tranche
