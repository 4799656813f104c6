// Compiled once, without special flags: hands each call to the copy built for this machine.
#include "core/isa.h"
#include "tree/tree_attention.h"

namespace tranche::cpu {

TRANCHE_ISA_DISPATCH(tree_attention, TreeAttentionParams)

#if defined(__x86_64__)
namespace baseline { size_t tree_attention_workspace(const TreeAttentionParams&); }
namespace avx2 { size_t tree_attention_workspace(const TreeAttentionParams&); }
namespace avx512 { size_t tree_attention_workspace(const TreeAttentionParams&); }
namespace amx { size_t tree_attention_workspace(const TreeAttentionParams&); }

size_t tree_attention_workspace(const TreeAttentionParams& params) {
  switch (isa()) {
    case Isa::amx: return amx::tree_attention_workspace(params);
    case Isa::avx512: return avx512::tree_attention_workspace(params);
    case Isa::avx2: return avx2::tree_attention_workspace(params);
    case Isa::baseline: return baseline::tree_attention_workspace(params);
  }
  return 0;
}
#else
namespace baseline { size_t tree_attention_workspace(const TreeAttentionParams&); }

size_t tree_attention_workspace(const TreeAttentionParams& params) {
  return baseline::tree_attention_workspace(params);
}
#endif

}  // namespace tranche::cpu
