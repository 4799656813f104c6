// Which accesses are ordered: the happens-before relation of a launch.
#pragma once

#include "sim/rt/machine.h"

namespace tranche::sim {

// Whether a write, or all the reads of a cell, happen before everything that `thread` does from now on.
// `shared` tells that the cell is of the block's own shared memory, where older blocks' stamps mean nothing.
bool write_is_ordered(const Thread& thread, const Cell& cell, bool shared);
bool reads_are_ordered(const Thread& thread, const Cell& cell, bool shared);
void note_read(const Thread& thread, Cell& cell, bool shared, uintptr_t pc);
inline void note_write(const Thread& thread, Cell& cell, bool atomic, uintptr_t pc) {
  const Block& block = *thread.block;
  cell.write = WriteStamp::make(block.epoch, block.now, thread.id, atomic);
  cell.write_pc = uint32_t(pc);
  cell.read = {};
  cell.readers = 0;
}

// __syncwarp over `lanes`; a named barrier over whole warps, of which `waiting` go on knowing of all.
void order_lanes(Warp& warp, uint32_t lanes);
void order_warps(Block& block, uint32_t waiting, uint32_t arrived, const uint32_t* labels);

// An atomic on global memory takes what others have handed over at its address, and hands over in turn; a
// volatile read does the first, a volatile write the second.
void take_over(Thread& thread, uintptr_t address);
void hand_over(Thread& thread, uintptr_t address);

void advance_label(Block& block);

}  // namespace tranche::sim
