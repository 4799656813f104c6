// The convolutions of the family on the CPU, compiled once per instruction set.
#include "pconv/partial_conv2d_cpu.h"
#include "core/isa.h"

namespace tranche::cpu::TRANCHE_ISA {

namespace {

template <class T, class A>
void run_as(const PartialConv2dParams& p) {
  const ConvPlan plan = conv_plan(p);
  Convolution<T, A>(p, plan).run();
}

}  // namespace

size_t partial_conv2d_workspace(const PartialConv2dParams& p) {
  return conv_workspace(p, p.type == DType::f64 ? sizeof(double) : sizeof(float));
}

void partial_conv2d(const PartialConv2dParams& p) {
  switch (p.type) {
    case DType::f64:
      return run_as<double, double>(p);
    case DType::f32:
      return run_as<float, float>(p);
    case DType::f16:
      return run_as<half, float>(p);
    case DType::bf16:
      return run_as<bf16, float>(p);
    default:
      return;
  }
}

}  // namespace tranche::cpu::TRANCHE_ISA

TRANCHE_CPU_ENTRY(size_t, partial_conv2d_workspace, PartialConv2dParams)
TRANCHE_CPU_ENTRY(void, partial_conv2d, PartialConv2dParams)
