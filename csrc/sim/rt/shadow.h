// What is remembered about memory: for each 4-byte word who wrote it last and who has read it since. Stamps
// carry an epoch number that no other block and no other phase between barriers shares, so nothing is ever
// cleared: a word of an earlier block, or of an earlier launch, is recognised by its old epoch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

namespace tranche::sim {

struct Thread;

// Packed: epoch 28 bits, label 24, thread 10, one spare, atomic 1.
struct WriteStamp {
  uint64_t bits = 0;
  uint32_t epoch() const { return uint32_t(bits >> 36); }
  uint32_t label() const { return uint32_t(bits >> 12) & 0xffffffu; }
  uint32_t thread() const { return uint32_t(bits >> 2) & 0x3ffu; }
  bool atomic() const { return bits & 1; }
  static WriteStamp make(uint32_t epoch, uint32_t label, uint32_t thread, bool atomic) {
    return {uint64_t(epoch) << 36 | uint64_t(label) << 12 | uint64_t(thread) << 2 | uint64_t(atomic)};
  }
};

// The readers since the last write: some lanes of one warp, or some warps of one block, or several blocks.
struct ReadStamp {
  uint64_t bits = 0;
  uint32_t epoch() const { return uint32_t(bits >> 36); }
  uint32_t label() const { return uint32_t(bits >> 12) & 0xffffffu; }
  uint32_t warp() const { return uint32_t(bits >> 2) & 0x1fu; }
  bool many_warps() const { return bits & 2; }
  bool many_blocks() const { return bits & 1; }
  static ReadStamp make(uint32_t epoch, uint32_t label, uint32_t warp, bool many_warps, bool many_blocks) {
    return {uint64_t(epoch) << 36 | uint64_t(label) << 12 | uint64_t(warp) << 2 | uint64_t(many_warps) << 1 |
            uint64_t(many_blocks)};
  }
};

constexpr uint32_t kMaxEpoch = (1u << 28) - 1;
constexpr uint32_t kMaxLabel = (1u << 24) - 1;

struct Cell {
  WriteStamp write;
  ReadStamp read;
  uint32_t readers = 0;                // lanes of read.warp(), or warps
  uint32_t write_pc = 0, read_pc = 0;  // low halves of code addresses
  uint8_t valid = 0;                   // shared memory: which of the four bytes belong to a variable
  uint8_t split = 0;                   // the four bytes have cells of their own
  uint16_t in_flight = 0;              // 1 + thread of a cp.async that will write here
};
static_assert(sizeof(Cell) == 32);

// A block's shared memory with its shadow. The dynamic part starts at kDynamicOffset, the static variables
// follow at kStaticOffset; everything else is a moat that no access may touch.
class SharedShadow {
 public:
  static constexpr size_t kDynamicOffset = 4096;
  static constexpr size_t kStaticOffset = kDynamicOffset + 228 * 1024 + 4096;
  static constexpr size_t kBytes = kStaticOffset + 64 * 1024;

  SharedShadow();
  SharedShadow(const SharedShadow&) = delete;
  SharedShadow& operator=(const SharedShadow&) = delete;

  bool contains(uintptr_t address) const { return address - low < kBytes; }
  Cell& word(uintptr_t address) { return words[(address - low) >> 2]; }
  Cell* bytes_of(const Cell& word) { return bytes + (&word - words) * 4; }

  // Declares which bytes belong to variables; earlier declarations are forgotten by clear_valid().
  void allow(size_t offset, size_t count);
  void clear_valid();
  void reset_stamps();

  uintptr_t low = 0;
  Cell* words = nullptr;
  Cell* bytes = nullptr;

 private:
  std::vector<std::pair<size_t, size_t>> allowed_;
};

// The shadow of global memory, made page by page when touched.
class GlobalShadow {
 public:
  Cell& word(uintptr_t address) {
    const uintptr_t page = address >> 12;
    if (page != last_page_) find(page);
    return last_->words[(address & 4095) >> 2];
  }
  // Of the page that word() was last asked for.
  Cell* bytes_of(const Cell& word);
  // Frees what a launch over large buffers has left behind.
  void trim();
  void reset_stamps() { pages_.clear(), last_page_ = 0, last_ = nullptr; }

 private:
  struct Page {
    Cell words[1024];
    std::unique_ptr<Cell[]> bytes;
  };
  void find(uintptr_t page);

  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  uintptr_t last_page_ = 0;
  Page* last_ = nullptr;
};

struct Access {
  uintptr_t address;
  size_t bytes;
  uintptr_t pc;
  bool write;
  bool atomic;
};

// Checks one access of the current thread and remembers it. Returns only if the access may be carried out.
void check_access(Thread& thread, const Access& access);

// For cp.async: the destination is claimed when the copy is issued and written when it lands.
void claim_in_flight(Thread& thread, uintptr_t address, size_t bytes, uintptr_t pc);
void land_in_flight(Thread& thread, uintptr_t address, size_t bytes, uint32_t pc);
void forget_in_flight(Thread& thread, uintptr_t address, size_t bytes);

void end_of_launch_shadow();
// Before epoch numbers run out.
void reset_shadow_stamps();

}  // namespace tranche::sim
