#pragma once

namespace tranche::sim {

// While it lives, a fault inside a simulated thread (a wild pointer, a stack that overflows into its guard
// page) is a finding that ends the kernel, not the process. Other faults go where they went before.
class FaultGuard {
 public:
  FaultGuard();
  FaultGuard(const FaultGuard&) = delete;
  FaultGuard& operator=(const FaultGuard&) = delete;
  ~FaultGuard();
};

}  // namespace tranche::sim
