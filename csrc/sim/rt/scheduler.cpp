// Who runs next. A fiber that has to wait switches straight to another one; the host's own stack is entered
// only when a block has ended or nobody can go on.
#include <algorithm>
#include <cstdlib>
#include <exception>
#include <numeric>

#include "sim/rt/findings.h"

namespace tranche::sim {

uint64_t seed_from_environment() {
  const char* text = getenv("TRANCHE_SIM_SEED");
  return text != nullptr ? strtoull(text, nullptr, 0) : 0;
}

Machine machine;
__thread Thread* current = nullptr;
__thread Thread* checked = nullptr;

namespace {

constexpr uint64_t kMaxIdlePauses = 1u << 22;

Block* pick_block(Block* preferred) {
  uint64_t dice = machine.random.next();
  if (preferred != nullptr && preferred->runnable_warps != 0 && (dice & 31) != 0) return preferred;
  const size_t count = machine.slots.size(), first = size_t(dice >> 40) % count;
  for (size_t i = 0; i < count; ++i) {
    Block* block = machine.slots[(first + i) % count];
    if (block->resident && block->runnable_warps != 0) return block;
  }
  return nullptr;
}

// Takes a runnable thread off its warp's list, or returns null. Mostly stays within the warp: its lanes' data
// is in the cache, and its next collective needs them all.
Thread* pick_next(Block* block, Warp* warp) {
  block = pick_block(block);
  if (block == nullptr) return nullptr;
  if (warp == nullptr || warp->block != block || warp->runnable == 0 || (machine.random.next() >> 61) == 0) {
    warp = &block->warps[machine.random.pick(block->runnable_warps)];
  }
  const uint32_t lane = machine.random.pick(warp->runnable);
  warp->runnable &= ~(1u << lane);
  if (warp->runnable == 0) block->runnable_warps &= ~(1u << warp->index);
  return &lane_of(*warp, lane);
}

void switch_to(Fiber& from, Thread* next) {
  ++machine.counters.switches;
  current = next;
  checked = machine.checks ? next : nullptr;
  Fiber& to = next != nullptr ? next->fiber : machine.main;
  Fiber::switch_to(from, to, machine.use_ucontext);
}

void leave(Thread& thread) {
  Block& block = *thread.block;
  if (!thread.may_touch_global) {
    report(&thread, "overlap: ends without grid_dependency_wait, so that a later kernel may not rely on it",
           {}, 0);
  }
  thread.wait = Wait::exited;
  thread.warp->exited |= 1u << thread.lane;
  --block.threads_live;
  drop_copies(thread);
  warp_after_exit(thread);
  barriers_after_exit(thread);
  machine.launch.idle_pauses = 0;
  switch_to(thread.fiber, block.threads_live == 0 ? nullptr : pick_next(&block, thread.warp));
  __builtin_unreachable();
}

// Nothing thrown may leave a fiber: there is no caller on its stack to catch it.
void fiber_main() noexcept {
  Thread& thread = *current;
  std::string thrown;
  try {
    machine.launch.body(machine.launch.context);
  } catch (const std::exception& e) {
    thrown = e.what();
  } catch (...) {
    thrown = "unknown";
  }
  if (!thrown.empty()) report_and_stop(&thread, "exception in the kernel: " + thrown, {}, 0);
  leave(thread);
}

void start_block(Block& block, uint32_t linear) {
  const Launch& launch = machine.launch;
  const uint3 grid = launch.grid, shape = launch.block;
  block.linear = linear;
  block.index = {linear % grid.x, linear / grid.x % grid.y, linear / grid.x / grid.y};
  block.resident = true;
  block.threads_live = launch.threads_per_block;
  block.warp_count = (launch.threads_per_block + kWarpSize - 1) / kWarpSize;
  block.runnable_warps = 0;
  block.barrier = {};
  for (BarrierState& barrier : block.named) barrier = {};
  block.acquired.clear();
  block.acquired_version.clear();
  block.epoch = 0;
  begin_epoch(block);
  block.first_epoch = block.epoch;

  auto* dynamic = reinterpret_cast<void*>(block.shared.low + SharedShadow::kDynamicOffset);
  memset(dynamic, 0xff, launch.dynamic_smem);  // as bf16, half and float: NaN
  memset(reinterpret_cast<void*>(block.shared.low + SharedShadow::kStaticOffset), 0xff, launch.static_top);

  if (block.threads.size() < launch.threads_per_block) block.threads.resize(launch.threads_per_block);
  for (uint32_t w = 0; w < block.warp_count; ++w) {
    Warp& warp = block.warps[w];
    warp.block = &block;
    warp.index = w;
    const uint32_t lanes = std::min(kWarpSize, launch.threads_per_block - w * kWarpSize);
    warp.exists = lanes == kWarpSize ? 0xffffffffu : (1u << lanes) - 1;
    warp.exited = 0;
    warp.pending_count = 0;
    warp.runnable = warp.at_barrier = 0;
    wake(warp, warp.exists);
  }
  for (uint32_t id = 0; id < launch.threads_per_block; ++id) {
    Thread& thread = block.threads[id];
    thread.block = &block;
    thread.warp = &block.warps[id / kWarpSize];
    thread.id = uint16_t(id);
    thread.lane = uint8_t(id % kWarpSize);
    thread.index = {id % shape.x, id / shape.x % shape.y, id / shape.x / shape.y};
    thread.wait = Wait::nothing;
    thread.fence = {};
    thread.may_touch_global = !launch.overlaps;
    thread.stack = machine.stacks.get(block.slot * kMaxThreads + id);
    thread.fiber.start(thread.stack, fiber_main, machine.use_ucontext);
  }
  ++machine.counters.blocks;
}

void report_deadlock() {
  for (Block* block : machine.slots) {
    if (!block->resident) continue;
    for (uint32_t id = 0; id < machine.launch.threads_per_block; ++id) {
      const Thread& thread = block->threads[id];
      if (thread.wait == Wait::nothing || thread.wait == Wait::exited) continue;
      std::string what = "deadlock: waits for ever";
      if (thread.wait == Wait::warp) {
        what +=
            " in " + std::string(op_name(thread.op)) + " with mask " + mask_text(thread.mask) + " for lane";
        const Warp& warp = *thread.warp;
        uint32_t arrived = 0;
        for (uint32_t i = 0; i < warp.pending_count; ++i) {
          const Rendezvous& r = warp.pending[i];
          if (r.op == thread.op && r.mask == thread.mask && r.site.line == thread.site.line)
            arrived |= r.arrived;
        }
        uint32_t missing = thread.mask & ~arrived;
        for (; missing != 0; missing &= missing - 1) {
          const auto lane = uint32_t(__builtin_ctz(missing));
          what += " " + std::to_string(lane);
          if (!(warp.exists >> lane & 1)) {
            what += " (does not exist)";
            continue;
          }
          const Thread& other = lane_of(*thread.warp, lane);
          if (other.wait == Wait::exited) what += " (exited)";
          if (other.wait == Wait::nothing) what += " (running)";
          if (other.wait == Wait::warp || other.wait == Wait::block || other.wait == Wait::named_barrier) {
            const char* at = other.wait == Wait::warp    ? op_name(other.op)
                             : other.wait == Wait::block ? "__syncthreads"
                                                         : "a named barrier";
            what += " (in " + std::string(at) + " at line " + std::to_string(other.site.line) + ")";
          }
        }
      } else if (thread.wait == Wait::block) {
        what += " in __syncthreads, where " + std::to_string(block->barrier.arrived) + " of " +
                std::to_string(block->threads_live) + " threads have arrived";
      } else {
        what += " in a named barrier";
      }
      report(&thread, what, thread.site, 0);
    }
  }
}

void start_next(const std::vector<uint32_t>& order, size_t& next, Block& block) {
  if (next < order.size()) start_block(block, order[next++]);
}

}  // namespace

void wake(Warp& warp, uint32_t lanes) {
  if (lanes == 0) return;
  warp.runnable |= lanes;
  warp.block->runnable_warps |= 1u << warp.index;
  // At once, not when they are resumed: others look at what a lane waits for.
  for (; lanes != 0; lanes &= lanes - 1) lane_of(warp, uint32_t(__builtin_ctz(lanes))).wait = Wait::nothing;
}

void park() {
  Thread* self = current;
  Thread* next = pick_next(self->block, self->warp);
  if (next != self) switch_to(self->fiber, next);
}

void yield_now() {
  wake(*current->warp, 1u << current->lane);
  park();
}

void stop_kernel() {
  machine.launch.stopped = true;
  switch_to(current->fiber, nullptr);
  __builtin_unreachable();
}

void run_launch() {
  Launch& launch = machine.launch;
  const size_t total = size_t(launch.grid.x) * launch.grid.y * launch.grid.z;
  std::vector<uint32_t> order(total);
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = total; i > 1; --i) std::swap(order[i - 1], order[machine.random.below(uint32_t(i))]);

  const size_t resident = std::min(total, size_t(kResidentBlocks));
  while (machine.slots.size() < resident) {
    auto* block = new Block;  // lives as long as the process: the next launch needs it too
    block->slot = uint32_t(machine.slots.size());
    machine.slots.push_back(block);
  }
  for (Block* block : machine.slots) {
    block->resident = false;
    block->shared.clear_valid();
    block->shared.allow(SharedShadow::kDynamicOffset, launch.dynamic_smem);
  }
  size_t next = 0;
  for (size_t i = 0; i < resident; ++i) start_next(order, next, *machine.slots[i]);

  while (!launch.stopped) {
    Thread* thread = pick_next(nullptr, nullptr);
    if (thread == nullptr) break;
    switch_to(machine.main, thread);
    for (Block* block : machine.slots) {
      if (!block->resident || block->threads_live != 0) continue;
      block->resident = false;
      start_next(order, next, *block);
    }
  }
  const bool stuck =
      std::any_of(machine.slots.begin(), machine.slots.end(), [](Block* b) { return b->resident; });
  if (stuck && !launch.stopped) report_deadlock();
  for (Block* block : machine.slots) {
    for (Thread& thread : block->threads) drop_copies(thread);
    block->resident = false;
  }
  end_of_launch_shadow();
}

}  // namespace tranche::sim

using namespace tranche::sim;

// A thread that polls must let others run, or it would poll for ever.
void tranche_sim_pause() {
  if (current == nullptr) return;
  if (++machine.launch.idle_pauses > kMaxIdlePauses) {
    report_and_stop(current, "deadlock: threads poll and nothing else happens", {}, 0);
  }
  yield_now();
}
