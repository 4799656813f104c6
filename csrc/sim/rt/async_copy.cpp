// cp.async: the source is read when the copy is issued, the destination is written when its group is waited
// for, and between the two nobody may look.
#include "sim/rt/findings.h"

namespace tranche::sim {

namespace {

void land(Thread& thread, AsyncCopy& copy) {
  if (checked != nullptr) {
    land_in_flight(thread, reinterpret_cast<uintptr_t>(copy.to), copy.bytes, copy.pc);
  }
  memcpy(copy.to, copy.data, copy.bytes);
}

void require_aligned(const Thread& thread, const void* address, uint32_t bytes, const char* what, Site site) {
  if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
  report_and_stop(&thread,
                  "misaligned: the " + std::string(what) + " of a cp.async of " + std::to_string(bytes) +
                      " bytes is " + address_text(*thread.block, reinterpret_cast<uintptr_t>(address)),
                  site, 0);
}

}  // namespace

// A thread may leave with prefetches in flight; they just never land.
void drop_copies(Thread& thread) {
  for (size_t i = thread.copies_landed; i < thread.copies.size(); ++i) {
    forget_in_flight(thread, reinterpret_cast<uintptr_t>(thread.copies[i].to), thread.copies[i].bytes);
  }
  thread.copies.clear();
  thread.group_ends.clear();
  thread.copies_landed = thread.groups_landed = 0;
}

}  // namespace tranche::sim

using namespace tranche::sim;

void tranche_sim_copy_async(void* shared, const void* global, uint32_t bytes, bool valid, Site site) {
  Thread& thread = *current;
  const auto pc = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  const auto to = reinterpret_cast<uintptr_t>(shared), from = reinterpret_cast<uintptr_t>(global);
  require_aligned(thread, shared, bytes, "destination", site);
  require_aligned(thread, global, bytes, "source", site);
  if (!thread.block->shared.contains(to)) {
    report_and_stop(&thread, "cp.async: the destination is not in the block's shared memory", site, 0);
  }
  if (valid && thread.block->shared.contains(from)) {
    report_and_stop(&thread, "cp.async: the source is not in global memory", site, 0);
  }
  if (checked != nullptr) {
    if (valid) check_access(thread, {from, bytes, pc, false, false});
    claim_in_flight(thread, to, bytes, pc);
  }
  AsyncCopy& copy = thread.copies.emplace_back();
  copy.to = static_cast<std::byte*>(shared);
  copy.bytes = bytes;
  copy.pc = uint32_t(pc);
  if (valid) {
    memcpy(copy.data, global, bytes);
  } else {
    memset(copy.data, 0, bytes);
  }
}

void tranche_sim_copy_async_commit() {
  Thread& thread = *current;
  thread.group_ends.push_back(thread.copies.size());
}

void tranche_sim_copy_async_wait(uint32_t pending) {
  Thread& thread = *current;
  while (thread.group_ends.size() - thread.groups_landed > pending) {
    const size_t end = thread.group_ends[thread.groups_landed++];
    while (thread.copies_landed < end) land(thread, thread.copies[thread.copies_landed++]);
  }
  if (thread.copies_landed == thread.copies.size() && thread.groups_landed == thread.group_ends.size()) {
    thread.copies.clear();
    thread.group_ends.clear();
    thread.copies_landed = thread.groups_landed = 0;
  }
}

uint4 tranche_sim_load_16(const void* global, Site site) {
  Thread& thread = *current;
  const auto address = reinterpret_cast<uintptr_t>(global);
  if (address % 16 != 0) {
    report_and_stop(&thread, "misaligned: a load of 16 bytes, " + address_text(*thread.block, address), site,
                    0);
  }
  if (thread.block->shared.contains(address)) {
    report_and_stop(&thread, "load_streaming_16: the address is not in global memory", site, 0);
  }
  if (checked != nullptr) {
    check_access(thread,
                 {address, 16, reinterpret_cast<uintptr_t>(__builtin_return_address(0)), false, false});
  }
  uint4 value;
  memcpy(&value, global, sizeof value);
  return value;
}
