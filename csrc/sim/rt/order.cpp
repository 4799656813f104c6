#include "sim/rt/order.h"

#include <algorithm>

#include "sim/rt/findings.h"

namespace tranche::sim {

namespace {

uint32_t block_of_epoch(uint32_t epoch) {
  return machine.launch.epoch_owner[epoch - machine.launch.first_epoch];
}

// An access of this block, made since its last barrier.
bool ordered_in_phase(const Thread& thread, uint32_t id, uint32_t label) {
  if (id == thread.id) return true;
  const Warp& warp = *thread.warp;
  const uint32_t other_warp = id / kWarpSize;
  if (other_warp == warp.index) {
    return label < warp.floor || (warp.partial && label < warp.seen[thread.lane][id % kWarpSize]);
  }
  const Block& block = *thread.block;
  return block.named_used && label < block.seen[warp.index][other_warp];
}

bool same_warp(uint32_t a, uint32_t b) { return a / kWarpSize == b / kWarpSize; }

// Whether a fence stands after the access: the accessing thread's own, or that of the thread which made the
// hand-over and before whose fence the access was ordered.
bool fenced(const Release& release, uint32_t id, uint32_t epoch, uint32_t label) {
  const Fence& fence = release.fence;
  if (fence.epoch != 0) {
    if (epoch < fence.epoch) return true;
    if (epoch == fence.epoch && id == release.id && label < fence.label) return true;
    if (epoch == fence.epoch && same_warp(id, release.id) && label < fence.floor) return true;
  }
  const auto own = machine.launch.fences.find(uint64_t(release.block) << 10 | id);
  if (own == machine.launch.fences.end()) return false;
  return epoch < own->second.epoch || (epoch == own->second.epoch && label < own->second.label);
}

bool before_release(const Release& release, uint32_t id, uint32_t epoch, uint32_t label) {
  if (epoch != release.epoch) return epoch < release.epoch;
  if (id == release.id) return label <= release.label;
  return same_warp(id, release.id) && label < release.floor;
}

// An access by thread `id` of `block`, if the thread knows of it through fences and atomics.
bool handed_over_to(const Thread& thread, uint32_t block, uint32_t id, uint32_t epoch, uint32_t label) {
  for (const Acquired& acquired : thread.block->acquired) {
    if (acquired.release.block != block) continue;
    const bool known = acquired.id == thread.id || acquired.epoch < thread.block->epoch ||
                       (same_warp(acquired.id, thread.id) && acquired.label < thread.warp->floor);
    if (known && before_release(acquired.release, id, epoch, label) &&
        fenced(acquired.release, id, epoch, label)) {
      return true;
    }
  }
  return false;
}

}  // namespace

bool write_is_ordered(const Thread& thread, const Cell& cell, bool shared) {
  const Block& block = *thread.block;
  const uint32_t epoch = cell.write.epoch(), label = cell.write.label(), id = cell.write.thread();
  if (epoch == block.epoch) {
    return ordered_in_phase(thread, id, label) ||
           (!block.acquired.empty() && handed_over_to(thread, block.linear, id, epoch, label));
  }
  if (shared || epoch < machine.launch.first_epoch) return true;
  const uint32_t owner = block_of_epoch(epoch);
  return owner == block.linear || handed_over_to(thread, owner, id, epoch, label);
}

bool reads_are_ordered(const Thread& thread, const Cell& cell, bool shared) {
  const ReadStamp read = cell.read;
  const Block& block = *thread.block;
  const Warp& warp = *thread.warp;
  const uint32_t epoch = read.epoch(), label = read.label();
  if (epoch == 0 || (!shared && epoch < machine.launch.first_epoch)) return true;
  // Who they were is lost; a block that has taken over others' work is believed to have waited for all.
  if (read.many_blocks()) return !block.acquired.empty();
  if (epoch != block.epoch) {
    if (shared) return true;
    const uint32_t owner = block_of_epoch(epoch);
    if (owner == block.linear) return true;
    const uint32_t first = uint32_t(__builtin_ctz(cell.readers));
    return handed_over_to(
        thread, owner, read.many_warps() ? first * kWarpSize : read.warp() * kWarpSize + first, epoch, label);
  }
  if (read.many_warps()) {
    for (uint32_t rest = cell.readers; rest != 0; rest &= rest - 1) {
      const auto other = uint32_t(__builtin_ctz(rest));
      if (other == warp.index ? label >= warp.floor
                              : !(block.named_used && label < block.seen[warp.index][other])) {
        return false;
      }
    }
    return true;
  }
  const uint32_t others = read.warp() == warp.index ? cell.readers & ~(1u << thread.lane) : cell.readers;
  for (uint32_t rest = others; rest != 0; rest &= rest - 1) {
    const auto lane = uint32_t(__builtin_ctz(rest));
    if (!ordered_in_phase(thread, read.warp() * kWarpSize + lane, label)) return false;
  }
  return true;
}

void note_read(const Thread& thread, Cell& cell, bool shared, uintptr_t pc) {
  const Block& block = *thread.block;
  const Warp& warp = *thread.warp;
  const ReadStamp read = cell.read;
  const uint32_t epoch = read.epoch();
  uint32_t readers = 1u << thread.lane;
  bool many_warps = false, many_blocks = false;
  if (epoch == block.epoch && !read.many_blocks()) {
    if (read.many_warps()) {
      many_warps = true;
      readers = cell.readers | 1u << warp.index;
    } else if (read.warp() == warp.index) {
      // Earlier reads of the warp that are ordered before this one need no remembering.
      if (read.label() >= warp.floor) readers |= cell.readers;
    } else if (!(block.named_used && read.label() < block.seen[warp.index][read.warp()])) {
      many_warps = true;
      readers = 1u << read.warp() | 1u << warp.index;
    }
  } else if (!shared && epoch >= machine.launch.first_epoch) {
    if (read.many_blocks()) return;
    many_blocks = block_of_epoch(epoch) != block.linear;
  }
  cell.read = ReadStamp::make(block.epoch, block.now, warp.index, many_warps, many_blocks);
  cell.readers = readers;
  cell.read_pc = uint32_t(pc);
}

void advance_label(Block& block) {
  if (++block.now == kMaxLabel) {
    report_and_stop(current, "more synchronisations of warps between two block barriers than can be followed",
                    {}, 0);
  }
}

void order_lanes(Warp& warp, uint32_t lanes) {
  Block& block = *warp.block;
  advance_label(block);
  if (lanes == warp.live()) {
    warp.floor = block.now;
    return;
  }
  if (!warp.partial) {
    warp.partial = true;
    for (auto& row : warp.seen) std::fill(std::begin(row), std::end(row), 0);
  }
  for (uint32_t other = 0; other < kWarpSize; ++other) {
    uint32_t known = block.now;
    if (!(lanes >> other & 1)) {
      known = 0;
      for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
        known = std::max(known, warp.seen[__builtin_ctz(rest)][other]);
      }
    }
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) warp.seen[__builtin_ctz(rest)][other] = known;
  }
}

void order_warps(Block& block, uint32_t waiting, uint32_t arrived, const uint32_t* labels) {
  if (!block.named_used) {
    block.named_used = true;
    for (auto& row : block.seen) std::fill(std::begin(row), std::end(row), 0);
  }
  advance_label(block);
  for (uint32_t other = 0; other < block.warp_count; ++other) {
    uint32_t known = 0;
    if (waiting >> other & 1) {
      known = block.now;
    } else {
      if (arrived >> other & 1) known = labels[other];
      for (uint32_t rest = waiting | arrived; rest != 0; rest &= rest - 1) {
        known = std::max(known, block.seen[__builtin_ctz(rest)][other]);
      }
    }
    for (uint32_t rest = waiting; rest != 0; rest &= rest - 1) block.seen[__builtin_ctz(rest)][other] = known;
  }
  for (uint32_t rest = waiting; rest != 0; rest &= rest - 1)
    block.warps[__builtin_ctz(rest)].floor = block.now;
}

void take_over(Thread& thread, uintptr_t address) {
  Block& block = *thread.block;
  const auto found = machine.launch.releases.find(address);
  if (found == machine.launch.releases.end()) return;
  // Only what has been added since this block looked last.
  size_t& version = block.acquired_version[address];
  for (; version < found->second.size(); ++version) {
    const Release& release = found->second[version];
    if (release.block == block.linear && release.id == thread.id) continue;
    block.acquired.push_back({release, thread.id, block.epoch, block.now});
  }
}

void hand_over(Thread& thread, uintptr_t address) {
  Block& block = *thread.block;
  // A thread that never fenced may still pass on what its block fenced before a barrier.
  if (machine.launch.fences.empty()) return;
  std::vector<Release>& mine = machine.launch.releases[address];
  if (!mine.empty()) {  // a thread that polls hands nothing new over
    const Release& last = mine.back();
    if (last.block == block.linear && last.id == thread.id && last.epoch == block.epoch &&
        last.fence.epoch == thread.fence.epoch && last.fence.label == thread.fence.label) {
      return;
    }
  }
  for (const Acquired& acquired : block.acquired) {
    const bool known = acquired.id == thread.id || acquired.epoch < block.epoch;
    const bool there = std::any_of(mine.begin(), mine.end(), [&](const Release& r) {
      return r.block == acquired.release.block && r.epoch == acquired.release.epoch &&
             r.label == acquired.release.label && r.id == acquired.release.id;
    });
    if (known && !there) mine.push_back(acquired.release);
  }
  mine.push_back({block.linear, block.epoch, block.now, thread.warp->floor, thread.id, thread.fence});
  advance_label(block);
}

}  // namespace tranche::sim
