// The checks of one memory access: bounds, copies in flight, initialisation, races.
#include "sim/rt/findings.h"
#include "sim/rt/memory_map.h"
#include "sim/rt/order.h"

namespace tranche::sim {

namespace {

GlobalShadow global_shadow;

std::string verb(const Access& access) {
  std::string text = access.atomic ? "atomic access to " : access.write ? "write of " : "read of ";
  return text + std::to_string(access.bytes) + " bytes, ";
}

std::string thread_of_stamp(const Thread& thread, uint32_t epoch, uint32_t id, bool shared) {
  const Launch& launch = machine.launch;
  std::string text;
  if (!shared && epoch >= launch.first_epoch) {
    const uint32_t block = launch.epoch_owner[epoch - launch.first_epoch];
    if (block != thread.block->linear) {
      const uint3 grid = launch.grid;
      text = "block " + index_text({block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y}) + " ";
    }
  }
  return text + "thread " + thread_text(id);
}

const char* race_name(bool shared) { return shared ? "race in shared memory: " : "race in global memory: "; }

void report_race_with_write(const Thread& thread, const Cell& cell, const Access& access, bool shared) {
  report(&thread,
         race_name(shared) + verb(access) + address_text(*thread.block, access.address) +
             ", with nothing to order it after the " + (cell.write.atomic() ? "atomic access" : "write") +
             " by " + thread_of_stamp(thread, cell.write.epoch(), cell.write.thread(), shared),
         {}, access.pc, "", widen_pc(cell.write_pc, access.pc));
}

void report_race_with_read(const Thread& thread, const Cell& cell, const Access& access, bool shared) {
  const ReadStamp read = cell.read;
  std::string who;
  if (read.many_blocks()) {
    who = "several blocks, the last read";
  } else if (read.many_warps()) {
    who = "several warps, the last read";
  } else {
    uint32_t lanes = cell.readers;
    if (read.warp() == thread.warp->index && read.epoch() == thread.block->epoch)
      lanes &= ~(1u << thread.lane);
    const auto lane = uint32_t(__builtin_ctz(lanes != 0 ? lanes : cell.readers));
    who = thread_of_stamp(thread, read.epoch(), read.warp() * kWarpSize + lane, shared);
  }
  report(&thread,
         race_name(shared) + verb(access) + address_text(*thread.block, access.address) +
             ", with nothing to order it after the read by " + who,
         {}, access.pc, "", widen_pc(cell.read_pc, access.pc));
}

// An atomic reads as well as writes.
template <bool shared>
void check_cell(Thread& thread, Cell& cell, const Access& access) {
  const uint32_t written = cell.write.epoch();
  const bool fresh = written >= (shared ? thread.block->first_epoch : machine.launch.first_epoch);
  const bool reads = !access.write || access.atomic;
  if (shared && reads && !fresh) {
    report(&thread,
           "uninitialised shared memory: " + verb(access) + address_text(*thread.block, access.address) +
               ", which this block has not written",
           {}, access.pc);
  }
  if (fresh && !(access.atomic && cell.write.atomic()) && !write_is_ordered(thread, cell, shared)) {
    report_race_with_write(thread, cell, access, shared);
  }
  if (access.write) {
    if (cell.readers != 0 && !reads_are_ordered(thread, cell, shared)) {
      report_race_with_read(thread, cell, access, shared);
    }
    note_write(thread, cell, access.atomic, access.pc);
  } else if (!access.atomic) {
    note_read(thread, cell, shared, access.pc);
  }
}

template <bool shared>
Cell* bytes_of(Thread& thread, const Cell& word) {
  if constexpr (shared) return thread.block->shared.bytes_of(word);
  return global_shadow.bytes_of(word);
}

template <bool shared>
void check_word(Thread& thread, Cell& word, const Access& access, uint32_t mask) {
  if (mask == 15 && !word.split) {
    check_cell<shared>(thread, word, access);
    return;
  }
  Cell* bytes = bytes_of<shared>(thread, word);
  if (!word.split) {
    for (int i = 0; i < 4; ++i) bytes[i] = word;
    word.split = 1;
  }
  for (int i = 0; i < 4; ++i) {
    if (mask >> i & 1) check_cell<shared>(thread, bytes[i], access);
  }
  if (mask == 15 && access.write) {  // one history again
    word.split = 0;
    note_write(thread, word, access.atomic, access.pc);
  }
}

// Calls f(word address, mask of the bytes touched) for each word of the range.
template <class F>
void for_each_word(uintptr_t address, size_t bytes, F&& f) {
  const uintptr_t end = address + bytes;
  for (uintptr_t word = address & ~uintptr_t(3); word < end; word += 4) {
    uint32_t mask = 15;
    if (word < address) mask &= 15u << (address - word);
    if (word + 4 > end) mask &= 15u >> (word + 4 - end);
    f(word, mask);
  }
}

void require_bounds(Thread& thread, const Access& access) {
  SharedShadow& shared = thread.block->shared;
  for_each_word(access.address, access.bytes, [&](uintptr_t address, uint32_t mask) {
    if (!shared.contains(address) || (shared.word(address).valid & mask) != mask) {
      report_and_stop(
          &thread,
          "shared memory out of bounds: " + verb(access) + address_text(*thread.block, access.address), {},
          access.pc);
    }
  });
}

void check_shared(Thread& thread, const Access& access) {
  require_bounds(thread, access);
  SharedShadow& shared = thread.block->shared;
  for_each_word(access.address, access.bytes, [&](uintptr_t address, uint32_t mask) {
    Cell& word = shared.word(address);
    if (word.in_flight != 0) {
      report(&thread,
             "cp.async data in flight: " + verb(access) + address_text(*thread.block, access.address) +
                 ", for which the cp.async of thread " + thread_text(word.in_flight - 1u) +
                 " has not been waited, issued",
             {}, access.pc, "", widen_pc(word.write_pc, access.pc));
      return;
    }
    check_word<true>(thread, word, access, mask);
  });
}

void check_global(Thread& thread, const Access& access) {
  switch (place_of(access.address, access.bytes)) {
    case Place::global:
    case Place::module:
      break;
    case Place::host_stack:
      if (!access.write) return;
      [[fallthrough]];
    case Place::local:
    case Place::nowhere:
      for (Block* block : machine.slots) {
        if (block->shared.contains(access.address)) {
          report_and_stop(&thread, "shared memory of another block: " + verb(access), {}, access.pc);
        }
      }
      if (machine.stacks.contains(access.address)) {
        report_and_stop(&thread, "local memory of another thread: " + verb(access), {}, access.pc);
      }
      report_and_stop(
          &thread,
          "global memory out of bounds: " + verb(access) + address_text(*thread.block, access.address), {},
          access.pc);
  }
  if (!thread.may_touch_global) {
    report(&thread,
           "overlap: " + verb(access) + address_text(*thread.block, access.address) +
               ", before grid_dependency_wait: the kernel before this one may still run",
           {}, access.pc);
  }
  for_each_word(access.address, access.bytes, [&](uintptr_t address, uint32_t mask) {
    check_word<false>(thread, global_shadow.word(address), access, mask);
  });
}

}  // namespace

void check_access(Thread& thread, const Access& access) {
  if (access.address - thread.stack.low < thread.stack.bytes || access.bytes == 0) return;
  ++machine.counters.checked_accesses;
  if (thread.block->shared.contains(access.address)) {
    check_shared(thread, access);
  } else {
    check_global(thread, access);
  }
}

void claim_in_flight(Thread& thread, uintptr_t address, size_t bytes, uintptr_t pc) {
  const Access access{address, bytes, pc, true, false};
  require_bounds(thread, access);
  check_shared(thread, access);
  for_each_word(address, bytes, [&](uintptr_t word, uint32_t) {
    Cell& cell = thread.block->shared.word(word);
    cell.in_flight = uint16_t(thread.id + 1);
  });
}

void land_in_flight(Thread& thread, uintptr_t address, size_t bytes, uint32_t pc) {
  for_each_word(address, bytes, [&](uintptr_t word, uint32_t) {
    Cell& cell = thread.block->shared.word(word);
    cell.in_flight = 0;
    cell.split = 0;
    note_write(thread, cell, false, pc);
  });
}

void forget_in_flight(Thread& thread, uintptr_t address, size_t bytes) {
  for_each_word(address, bytes,
                [&](uintptr_t word, uint32_t) { thread.block->shared.word(word).in_flight = 0; });
}

void end_of_launch_shadow() { global_shadow.trim(); }

void reset_shadow_stamps() {
  global_shadow.reset_stamps();
  for (Block* block : machine.slots) block->shared.reset_stamps();
}

}  // namespace tranche::sim
