// Memory that will be needed soon, asked for a little at a time beside other work, so that the one does not
// wait for the other.
#pragma once

#include <cstdint>

#include "core/isa.h"

namespace tranche::cpu::TRANCHE_ISA {

class Ahead {
 public:
  Ahead() = default;
  // `rows` rows of `bytes` bytes, each `step` bytes after the one before, in about `calls` calls of ask().
  Ahead(const void* first, int64_t rows, int64_t step, int64_t bytes, int64_t calls)
      : row_(static_cast<const char*>(first)), step_(step), bytes_(bytes), rows_(rows) {
    share_ = rows > 0 && calls > 0 ? (rows * ((bytes + kLine - 1) / kLine) + calls - 1) / calls : 0;
  }

  void ask() {
    for (int64_t i = 0; i < share_ && rows_ > 0; ++i) {
      __builtin_prefetch(row_ + at_, 0, 2);
      at_ += kLine;
      if (at_ < bytes_) continue;
      at_ = 0;
      row_ += step_;
      --rows_;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  const char* row_ = nullptr;
  int64_t step_ = 0, bytes_ = 0, rows_ = 0, at_ = 0, share_ = 0;
};

}  // namespace tranche::cpu::TRANCHE_ISA
