#include "sim/rt/memory_map.h"

#include <link.h>
#include <pthread.h>

#include <algorithm>
#include <cstdio>
#include <vector>

#include "sim/rt/machine.h"

namespace tranche::sim {

namespace {

struct Range {
  uintptr_t low, high;
};

thread_local std::vector<Range> registered;

// Of the launch in progress.
std::vector<Range> buffers;
size_t last_hit = 0;
std::vector<Range> modules;

int add_module(dl_phdr_info* info, size_t, void*) {
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    if (segment.p_type != PT_LOAD) continue;
    const uintptr_t low = info->dlpi_addr + segment.p_vaddr;
    modules.push_back({low, low + segment.p_memsz});
  }
  return 0;
}

bool within(const Range& range, uintptr_t address, size_t bytes) {
  return address >= range.low && address < range.high && bytes <= range.high - address;
}

bool in_module(uintptr_t address, size_t bytes) {
  if (modules.empty()) dl_iterate_phdr(add_module, nullptr);
  return std::any_of(modules.begin(), modules.end(),
                     [&](const Range& range) { return within(range, address, bytes); });
}

// Where this host thread's stack ends. Asking takes the main thread a walk through /proc, so it is done once.
uintptr_t end_of_stack() {
  static thread_local const uintptr_t end = [] {
    pthread_attr_t attributes;
    void* base = nullptr;
    size_t bytes = 0;
    if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
      pthread_attr_getstack(&attributes, &base, &bytes);
      pthread_attr_destroy(&attributes);
    }
    return reinterpret_cast<uintptr_t>(base) + bytes;
  }();
  return end;
}

}  // namespace

void begin_memory_map() {
  buffers = registered;
  last_hit = 0;
  modules.clear();  // libraries may have come and gone

  // The launching functions' variables lie from here up.
  machine.host_stack_low = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
  machine.host_stack_high = std::max(machine.host_stack_low, end_of_stack());
}

Place place_of(uintptr_t address, size_t bytes) {
  if (last_hit < buffers.size() && within(buffers[last_hit], address, bytes)) return Place::global;
  for (size_t i = 0; i < buffers.size(); ++i) {
    if (within(buffers[i], address, bytes)) {
      last_hit = i;
      return Place::global;
    }
  }
  if (address < 4096) return Place::nowhere;
  if (address >= machine.host_stack_low && address < machine.host_stack_high) return Place::host_stack;
  if (buffers.empty()) return machine.stacks.contains(address) ? Place::local : Place::global;
  if (machine.stacks.contains(address)) return Place::local;
  return in_module(address, bytes) ? Place::module : Place::nowhere;
}

std::string global_address_text(uintptr_t address) {
  char text[96];
  const Range* nearest = nullptr;
  auto distance = [&](const Range& r) {
    return address < r.low ? r.low - address : address >= r.high ? address - r.high + 1 : 0;
  };
  for (const Range& range : buffers) {
    if (nearest == nullptr || distance(range) < distance(*nearest)) nearest = &range;
  }
  if (nearest != nullptr && distance(*nearest) < (1u << 20)) {
    snprintf(text, sizeof text, "byte %ld of a buffer of %zu bytes in global memory",
             long(address) - long(nearest->low), size_t(nearest->high - nearest->low));
  } else {
    snprintf(text, sizeof text, "global memory at 0x%zx", size_t(address));
  }
  return text;
}

}  // namespace tranche::sim

using tranche::sim::registered;

void tranche_sim_register_buffer(const void* address, size_t bytes) {
  const auto low = reinterpret_cast<uintptr_t>(address);
  if (address != nullptr && bytes != 0) registered.push_back({low, low + bytes});
}

void tranche_sim_unregister_buffer(const void* address, size_t bytes) {
  const auto low = reinterpret_cast<uintptr_t>(address);
  for (size_t i = registered.size(); i-- > 0;) {
    if (registered[i].low == low && registered[i].high == low + bytes) {
      registered.erase(registered.begin() + long(i));
      return;
    }
  }
}
