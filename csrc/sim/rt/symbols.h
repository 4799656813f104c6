#pragma once

#include <cstdint>
#include <string>

namespace tranche::sim {

// "file:line" of a return address, asked of addr2line (findings are rare, so nothing is kept ready); where
// that is missing, the symbol or the library with an offset.
std::string source_line(uintptr_t return_address);

// A path without what leads to the project, where it lies below it.
std::string short_path(const std::string& path);

}  // namespace tranche::sim
