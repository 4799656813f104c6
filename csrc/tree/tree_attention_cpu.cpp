#include "core/isa.h"
#include "tree/tree_attention.h"
namespace tranche::cpu {
namespace TRANCHE_ISA { void tree_attention(const TreeAttentionParams&) {} }
#ifdef TRANCHE_ISA_baseline
size_t tree_attention_workspace(const TreeAttentionParams&) { return 0; }
#endif
}
TRANCHE_CPU_ENTRY(tree_attention, TreeAttentionParams)
