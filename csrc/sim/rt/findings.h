// What went wrong, where, and in whose hands.
#pragma once

#include <cstdint>
#include <string>

#include "sim/rt/machine.h"

namespace tranche::sim {

// Records a finding of `thread` (or of the launch, if null), once per place and wording. A kernel that has
// collected too many is stopped. `other_words` and `other_pc` describe the access that this one conflicts
// with.
void report(const Thread* thread, const std::string& what, Site site, uintptr_t pc,
            const std::string& other_words = "", uintptr_t other_pc = 0);

// For what must not happen: the kernel ends here, before the bad access or the hopeless wait.
[[noreturn]] void report_and_stop(const Thread* thread, const std::string& what, Site site, uintptr_t pc);

// All findings of the launch as text, with source lines looked up.
std::string format_report(const Launch& launch);

std::string index_text(uint3 index);
std::string thread_text(uint32_t id);  // thread `id` of any block, as an index
std::string mask_text(uint32_t mask);
// "byte 12 of shared `sums`", "byte 96 of dynamic shared memory", "global memory at 0x..."
std::string address_text(const Block& block, uintptr_t address);

// The full code address whose low half is `low`, given another one nearby.
uintptr_t widen_pc(uint32_t low, uintptr_t near);

}  // namespace tranche::sim
