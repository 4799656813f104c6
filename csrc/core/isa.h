// CPU kernels choose their instruction set at run time.
//
// CMake compiles every <op>_cpu.cpp once per instruction set, each time with TRANCHE_ISA set to the name of
// the namespace (baseline, avx2, avx512, amx) and with that set's compiler flags. Everything a CPU kernel
// file and the headers it includes define must live in that namespace: were two copies of one inline
// function to share a name, the linker would keep one, and an older machine would meet AVX-512 code.
#pragma once

#include <cstdint>

namespace tranche {

enum class Isa : int32_t {
  baseline,  // x86-64 as the ABI defines it, or any other processor
  avx2,      // AVX2, FMA, F16C
  avx512,    // AVX-512 F, BW, DQ, VL, VNNI, BF16
  amx,       // the former, and AMX tiles with BF16 and INT8
};

// The best set that this processor and operating system offer, or the one that TRANCHE_ISA names in the
// environment if that is lower. Decided once per process.
Isa isa();
const char* isa_name(Isa);

}  // namespace tranche

// TRANCHE_CPU_ENTRY(Return, name, Params) ends an <op>_cpu.cpp: `Return tranche::cpu::name(const Params&)`,
// the choice among the namespaces' functions of the same name. It is nothing in all compilations of the file
// but the baseline's.
#if !defined(TRANCHE_ISA_baseline)
#define TRANCHE_CPU_ENTRY(Return, name, Params)
#elif defined(__x86_64__)
#define TRANCHE_CPU_ENTRY(Return, name, Params) \
  namespace tranche::cpu {                      \
  namespace avx2 {                              \
  Return name(const Params&);                   \
  }                                             \
  namespace avx512 {                            \
  Return name(const Params&);                   \
  }                                             \
  namespace amx {                               \
  Return name(const Params&);                   \
  }                                             \
  Return name(const Params& params) {           \
    switch (isa()) {                            \
      case Isa::amx:                            \
        return amx::name(params);               \
      case Isa::avx512:                         \
        return avx512::name(params);            \
      case Isa::avx2:                           \
        return avx2::name(params);              \
      case Isa::baseline:                       \
        break;                                  \
    }                                           \
    return baseline::name(params);              \
  }                                             \
  }
#else
#define TRANCHE_CPU_ENTRY(Return, name, Params)                        \
  namespace tranche::cpu {                                             \
  Return name(const Params& params) { return baseline::name(params); } \
  }
#endif
