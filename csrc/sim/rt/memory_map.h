// Which memory outside the simulated GPU a kernel may touch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace tranche::sim {

enum class Place {
  global,      // a registered buffer; or anything, while nothing is registered
  module,      // constants and variables of the program and its libraries
  host_stack,  // the launching thread's: how kernel parameters arrive
  local,       // another simulated thread's stack
  nowhere,
};

// Takes over the registrations of the launching host thread.
void begin_memory_map();
Place place_of(uintptr_t address, size_t bytes);
std::string global_address_text(uintptr_t address);

}  // namespace tranche::sim
