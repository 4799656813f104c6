// The read limit of a machine: a loop that reads a buffer once and does nothing else. Benchmarks run it
// beside each row, so that "percent of the limit" speaks of this machine at this minute.
#pragma once

#include <cstdint>

namespace tranche {

struct LimitReadParams {
  const uint64_t* buffer;  // [words], 64-byte aligned; words is a multiple of 8
  uint64_t* checksum;      // [parts] exclusive or of the words of each part
  int64_t words;
  int32_t parts;  // the buffer is read in this many consecutive parts
};

namespace cpu {
void limit_read(const LimitReadParams&);
}

namespace cuda {
void limit_read(const LimitReadParams&, void* stream);
}

}  // namespace tranche
