#include "sim/rt/shadow.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>

namespace tranche::sim {

namespace {

// Zero pages that cost nothing until touched.
void* reserve(size_t bytes) {
  void* base =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) throw std::bad_alloc();
  return base;
}

}  // namespace

SharedShadow::SharedShadow() {
  low = reinterpret_cast<uintptr_t>(reserve(kBytes));
  words = static_cast<Cell*>(reserve(kBytes / 4 * sizeof(Cell)));
  bytes = static_cast<Cell*>(reserve(kBytes * sizeof(Cell)));
}

void SharedShadow::allow(size_t offset, size_t count) {
  if (count == 0) return;
  const std::pair<size_t, size_t> range{offset, count};
  if (std::find(allowed_.begin(), allowed_.end(), range) != allowed_.end()) return;
  allowed_.push_back(range);
  for (size_t i = offset; i < offset + count; ++i) words[i >> 2].valid |= uint8_t(1u << (i & 3));
}

void SharedShadow::clear_valid() {
  for (const auto& [offset, count] : allowed_) {
    for (size_t i = offset; i < offset + count; ++i) words[i >> 2].valid = 0;
  }
  allowed_.clear();
}

void SharedShadow::reset_stamps() {
  clear_valid();
  madvise(words, kBytes / 4 * sizeof(Cell), MADV_DONTNEED);
  madvise(bytes, kBytes * sizeof(Cell), MADV_DONTNEED);
}

void GlobalShadow::find(uintptr_t page) {
  std::unique_ptr<Page>& slot = pages_[page];
  if (!slot) slot = std::make_unique<Page>();
  last_page_ = page;
  last_ = slot.get();
}

Cell* GlobalShadow::bytes_of(const Cell& word) {
  if (!last_->bytes) last_->bytes = std::make_unique<Cell[]>(4096);
  return &last_->bytes[(&word - last_->words) * 4];
}

void GlobalShadow::trim() {
  constexpr size_t kKeptPages = 2048;  // 64 MB of shadow
  if (pages_.size() > kKeptPages) reset_stamps();
}

}  // namespace tranche::sim
