// The state of the simulated GPU: one launch at a time, a few blocks of it resident, every thread a fiber.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

#include "sim/rt/fiber.h"
#include "sim/rt/random.h"
#include "sim/rt/shadow.h"
#include "sim/runtime.h"

namespace tranche::sim {

constexpr uint32_t kWarpSize = 32;
constexpr uint32_t kMaxThreads = 1024;
// Two blocks at a time show most of what blocks can do to each other; more would only crowd the caches.
constexpr uint32_t kResidentBlocks = 2;
static_assert(kResidentBlocks * kMaxThreads <= StackPool::kMaxStacks);
constexpr uint32_t kMaxWarps = kMaxThreads / kWarpSize;
constexpr uint32_t kNamedBarriers = 16;
constexpr size_t kMaxSharedBytes = 227 * 1024;
constexpr size_t kMaxStaticBytes = 48 * 1024;

struct Block;
struct Warp;

enum class Wait : uint8_t { nothing, warp, block, named_barrier, exited };

struct AsyncCopy {
  std::byte* to;
  uint32_t bytes;
  uint32_t pc;
  alignas(16) std::byte data[16];
};

// When a thread last executed __threadfence: what it and, by way of barriers, its block did before is
// published by its next atomic.
struct Fence {
  uint32_t epoch = 0, label = 0, floor = 0;
};

struct alignas(64) Thread {
  Fiber fiber;
  Stack stack;
  Block* block = nullptr;
  Warp* warp = nullptr;
  uint16_t id = 0;  // in the block, x fastest
  uint8_t lane = 0;
  uint3 index{};

  // What it waits for, kept for the findings' words.
  Wait wait = Wait::nothing;
  WarpOp op{};
  uint32_t mask = 0;
  Site site;

  // What it brings to a collective and takes from it.
  uint64_t value = 0, result = 0;
  uint32_t argument = 0, width = 0;
  const void* row = nullptr;
  uint32_t a[4] = {}, b[2] = {};
  union {
    float f32[4];
    int32_t s32[4];
    uint32_t u32[4];
  } d = {};
  uintptr_t pc = 0;

  std::vector<AsyncCopy> copies;   // in flight, oldest first
  std::vector<size_t> group_ends;  // committed groups: each ends before copies[group_end]
  size_t groups_landed = 0, copies_landed = 0;

  Fence fence;

  bool may_touch_global = true;  // no: it may overlap the kernel before it, and has not waited for that
};

// Lanes that have met, or are meeting, at one collective.
struct Rendezvous {
  WarpOp op;
  uint32_t mask, arrived;
  Site site;
};

struct Warp {
  Block* block = nullptr;
  uint32_t index = 0;
  uint32_t exists = 0, exited = 0, runnable = 0, at_barrier = 0;  // lanes
  std::array<Rendezvous, kWarpSize> pending;
  uint32_t pending_count = 0;

  // Order within the warp since the last block barrier: accesses labelled below `floor` are ordered before
  // everything to come. After a __syncwarp of a part of the warp, `seen[l][m]` says how far lane l knows of
  // m.
  uint32_t floor = 0;
  bool partial = false;
  uint32_t seen[kWarpSize][kWarpSize];

  uint32_t live() const { return exists & ~exited; }
};

struct BarrierState {
  uint32_t arrived = 0;
  uint32_t sum = 0;
  BlockOp op{};
  Site site;
  // Named barriers only: how many it is for, which warps came, when, and which of them wait.
  uint32_t expected = 0, arrived_warps = 0, waiting_warps = 0;
  uint32_t labels[kMaxWarps] = {};
};

// A hand-over to other blocks: thread `id` of `block`, having fenced, did an atomic.
struct Release {
  uint32_t block, epoch, label, floor;
  uint16_t id;
  Fence fence;
};

struct Acquired {
  Release release;
  uint16_t id;
  uint32_t epoch, label;
};

struct Block {
  uint32_t linear = 0;
  uint3 index{};
  uint32_t slot = 0;
  bool resident = false;
  uint32_t threads_live = 0;
  uint32_t runnable_warps = 0;
  uint32_t warp_count = 0;
  std::vector<Thread> threads;  // as many as the launch's block has
  std::array<Warp, kMaxWarps> warps;
  BarrierState barrier;
  std::array<BarrierState, kNamedBarriers> named;

  SharedShadow shared;

  // The clock that orders accesses: the epoch is this block's alone and changes with every block barrier,
  // `now` grows with every partial synchronisation within it.
  uint32_t first_epoch = 0, epoch = 0, now = 1;
  bool named_used = false;
  uint32_t seen[kMaxWarps][kMaxWarps];  // as Warp::seen, between warps, by named barriers
  std::vector<Acquired> acquired;
  std::unordered_map<uintptr_t, size_t> acquired_version;
};

struct StaticShared {
  const void* declaration;
  std::string name;
  size_t offset, bytes;
};

struct Finding {
  std::string what;
  bool has_thread = false;
  uint3 block{}, thread{};
  Site site;
  uintptr_t pc = 0;        // of the access, when there is no site
  uintptr_t other_pc = 0;  // of the access it conflicts with
  std::string other;       // words before the place of other_pc
  int count = 1;
};

struct Launch {
  const char* name = "";
  uint3 grid{}, block{};
  uint32_t threads_per_block = 0;
  size_t dynamic_smem = 0;
  bool overlaps = false;  // the kernel before it may still run
  void (*body)(void*) = nullptr;
  void* context = nullptr;
  uint64_t number = 0;

  std::vector<StaticShared> statics;
  size_t static_top = 0;
  std::vector<Finding> findings;
  bool stopped = false;
  uint64_t idle_pauses = 0;

  uint32_t first_epoch = 0;
  std::vector<uint32_t> epoch_owner;  // block of epoch first_epoch + i
  std::unordered_map<uintptr_t, std::vector<Release>> releases;
  std::unordered_map<uint64_t, Fence> fences;  // block << 10 | thread
};

uint64_t seed_from_environment();

struct Machine {
  Launch launch;
  std::vector<Block*> slots;
  Fiber main;
  StackPool stacks;
  Random random;
  uint64_t seed = seed_from_environment();
  uint64_t launches_since_seed = 0;
  bool checks = true;
  bool use_ucontext = !has_assembly_switch();
  uint32_t next_epoch = 1;
  uintptr_t host_stack_low = 0, host_stack_high = 0;
  tranche_sim_counters counters{};
};

extern Machine machine;

// The fiber that this host thread is executing, or null outside a launch. `checked` is the same while memory
// accesses are to be checked, and null while they are not.
extern __thread Thread* current __attribute__((tls_model("initial-exec")));
extern __thread Thread* checked __attribute__((tls_model("initial-exec")));

// ---- scheduler.cpp

// Suspends the current fiber, which has recorded what it waits for, until somebody wakes it.
void park();
// Lets others run first; the current fiber stays runnable.
void yield_now();
void wake(Warp& warp, uint32_t lanes);
// Leaves the kernel for good, from within a fiber.
[[noreturn]] void stop_kernel();
void run_launch();

// ---- collectives.cpp, barriers.cpp

// Called when `thread` has exited: may complete what others wait for, or find that it never can be.
void warp_after_exit(Thread& thread);
void barriers_after_exit(Thread& thread);
void begin_epoch(Block& block);

// ---- async_copy.cpp

void drop_copies(Thread& thread);

// ---- matrix.cpp

void run_ldmatrix(Warp& warp, bool transposed);
void run_mma(Warp& warp, WarpOp op);

const char* op_name(WarpOp op);

inline Thread& lane_of(Warp& warp, uint32_t lane) {
  return warp.block->threads[warp.index * kWarpSize + lane];
}

}  // namespace tranche::sim
