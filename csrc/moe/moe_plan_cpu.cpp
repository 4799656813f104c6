// A counting sort, which is stable.
#include "core/isa.h"
#include "moe/moe_plan.h"

namespace tranche::cpu::TRANCHE_ISA {

void moe_plan(const MoePlanParams& p) {
  for (int e = 0; e <= p.experts; ++e) p.offsets[e] = 0;
  const auto valid = [&](int32_t id) { return id >= 0 && id < p.experts; };
  for (int i = 0; i < p.count; ++i) {
    if (valid(p.ids[i])) ++p.offsets[p.ids[i] + 1];
  }
  for (int e = 0; e < p.experts; ++e) p.offsets[e + 1] += p.offsets[e];
  const int32_t used = p.offsets[p.experts];
  // offsets[e] walks to the end of expert e, which is where e + 1 begins; then all move up by one
  for (int i = 0; i < p.count; ++i) {
    if (valid(p.ids[i])) p.slots[p.offsets[p.ids[i]]++] = i;
  }
  for (int e = p.experts; e > 0; --e) p.offsets[e] = p.offsets[e - 1];
  p.offsets[0] = 0;
  for (int i = used; i < p.count; ++i) p.slots[i] = -1;
}

}  // namespace tranche::cpu::TRANCHE_ISA

TRANCHE_CPU_ENTRY(void, moe_plan, MoePlanParams)
