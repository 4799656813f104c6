// One launch from beginning to end, and the controls.
#include <chrono>
#include <mutex>
#include <stdexcept>

#include "sim/rt/fault.h"
#include "sim/rt/findings.h"
#include "sim/rt/memory_map.h"

namespace tranche::sim {

namespace {

// Several host threads may launch; the machine serves them one after the other.
std::mutex launching;
thread_local std::string last_report;

void require_limits(const char* name, uint3 grid, uint3 block, size_t dynamic_smem) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  std::string excess;
  if (threads == 0 || threads > kMaxThreads || block.z > 64) excess = "the block's shape";
  if (grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu || blocks > 0x7fffffffu)
    excess = "the grid's shape";
  if (dynamic_smem > kMaxSharedBytes) excess = "dynamic shared memory";
  if (!excess.empty()) {
    throw std::runtime_error("tranche simulator: kernel " + std::string(name) + ": " + excess +
                             " exceeds the limits of a GPU");
  }
}

void launch_kernel(const char* name, const uint3* grid, const uint3* block, size_t dynamic_smem,
                   bool overlaps, void (*body)(void*), void* context) {
  if (current != nullptr) throw std::logic_error("tranche simulator: a kernel launches a kernel");
  require_limits(name, *grid, *block, dynamic_smem);
  if (grid->x == 0 || grid->y == 0 || grid->z == 0) return;

  std::lock_guard lock(launching);
  machine.launch = {};
  Launch& launch = machine.launch;
  launch.name = name;
  launch.grid = *grid;
  launch.block = *block;
  launch.threads_per_block = block->x * block->y * block->z;
  launch.dynamic_smem = dynamic_smem;
  launch.overlaps = overlaps;
  launch.body = body;
  launch.context = context;
  launch.number = machine.launches_since_seed++;
  if (machine.next_epoch > kMaxEpoch / 2) {
    reset_shadow_stamps();
    machine.next_epoch = 1;
  }
  launch.first_epoch = machine.next_epoch;
  machine.random.seed(machine.seed * 0x100000001b3ull + launch.number);
  ++machine.counters.launches;

  begin_memory_map();
  {
    FaultGuard guard;
    run_launch();
  }
  last_report = launch.findings.empty() ? "" : format_report(launch);
  if (!last_report.empty()) throw std::runtime_error(last_report);
}

}  // namespace
}  // namespace tranche::sim

using namespace tranche::sim;

void tranche_sim_launch(const char* name, const uint3* grid, const uint3* block, size_t dynamic_smem,
                        void (*body)(void*), void* context) {
  launch_kernel(name, grid, block, dynamic_smem, false, body, context);
}

void tranche_sim_launch_overlapping(const char* name, const uint3* grid, const uint3* block,
                                    size_t dynamic_smem, void (*body)(void*), void* context) {
  launch_kernel(name, grid, block, dynamic_smem, true, body, context);
}

void tranche_sim_grid_dependency_wait() { current->may_touch_global = true; }

uint3 tranche_sim_thread_index() { return current->index; }
uint3 tranche_sim_block_index() { return current->block->index; }
uint3 tranche_sim_block_shape() { return machine.launch.block; }
uint3 tranche_sim_grid_shape() { return machine.launch.grid; }

void* tranche_sim_dynamic_shared() {
  return reinterpret_cast<void*>(current->block->shared.low + SharedShadow::kDynamicOffset);
}

// Every variable gets just the alignment of its type and no more, so that a kernel which silently relies on
// more does not get away with it, and a moat that catches an index gone astray.
void* tranche_sim_static_shared(const void* declaration, const char* name, size_t bytes, size_t alignment) {
  Launch& launch = machine.launch;
  const uintptr_t base = current->block->shared.low;
  for (const StaticShared& known : launch.statics) {
    if (known.declaration == declaration) return reinterpret_cast<void*>(base + known.offset);
  }
  constexpr size_t kMoat = 64;
  size_t used = bytes;
  for (const StaticShared& known : launch.statics) used += known.bytes;
  size_t offset = SharedShadow::kStaticOffset + launch.static_top + kMoat;
  offset = (offset + 127) / 128 * 128;
  if (alignment < 16) offset += alignment;
  if (used > kMaxStaticBytes || used + launch.dynamic_smem > kMaxSharedBytes ||
      offset + bytes > SharedShadow::kBytes) {
    report_and_stop(current,
                    "shared memory: `" + std::string(name) + "` takes it to " +
                        std::to_string(used + launch.dynamic_smem) + " bytes, more than a block can have",
                    {}, 0);
  }
  launch.static_top = offset + bytes - SharedShadow::kStaticOffset;
  launch.statics.push_back({declaration, name, offset, bytes});
  for (Block* block : machine.slots) {
    block->shared.allow(offset, bytes);
    memset(reinterpret_cast<void*>(block->shared.low + offset), 0xff, bytes);
  }
  return reinterpret_cast<void*>(base + offset);
}

uint32_t tranche_sim_shared_offset(const void* pointer, Site site) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (!current->block->shared.contains(address)) {
    report_and_stop(current, "shared_address: the pointer is not into the block's shared memory", site, 0);
  }
  return uint32_t(address - current->block->shared.low);
}

int64_t tranche_sim_clock() { return std::chrono::steady_clock::now().time_since_epoch().count(); }

void tranche_sim_trap(const char* what, Site site) { report_and_stop(current, what, site, 0); }

void tranche_sim_set_seed(uint64_t seed) {
  std::lock_guard lock(launching);
  machine.seed = seed;
  machine.launches_since_seed = 0;
}

void tranche_sim_set_checks(int enabled) {
  std::lock_guard lock(launching);
  machine.checks = enabled != 0;
}

int tranche_sim_use_ucontext(int enabled) {
  std::lock_guard lock(launching);
  machine.use_ucontext = enabled != 0 || !has_assembly_switch();
  return machine.use_ucontext;
}

const char* tranche_sim_last_report() { return last_report.c_str(); }

void tranche_sim_read_counters(tranche_sim_counters* out) {
  std::lock_guard lock(launching);
  *out = machine.counters;
}
