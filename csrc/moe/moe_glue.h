// What the op files of the family share: checks of activations, routers and expert weights, and the plan.
#pragma once

#include "bits/packed_checks.h"
#include "core/torch_glue.h"
#include "moe/moe_experts.h"
#include "moe/moe_plan.h"
#include "moe/moe_route.h"

namespace tranche {

inline void check_activations(const TensorChecks& check, Phrase name, const Tensor& x) {
  check.dim(name, x, 2, "[T, H]");
#if defined(TRANCHE_BACKEND_CPU)
  check.dtype(name, x, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16, ScalarType::Double});
#else
  check.dtype(name, x, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16});
#endif
  check.last_contiguous(name, x);
  check.that(x.size(0) <= INT32_MAX / kMaxExperts && x.size(1) <= INT32_MAX,
             concat("at most 2^21 - 1 tokens and 2^31 - 1 features in ", name), shape_text(x),
             "Split the batch.");
}

// Rows [rows, H] that x is multiplied with.
inline void check_router(const TensorChecks& check, Phrase name, const Tensor& router, const Tensor& x) {
  check.dim(name, router, 2, "[E, H]");
  check.dtype(name, router, {x.scalar_type()});
  check.same_device(name, router, "x", x);
  check.last_contiguous(name, router);
  check.equal(concat(name, ".size(1)"), router.size(1), "x.size(1)", x.size(1),
              "The router takes the features of x.");
}

inline void check_expert_count(const TensorChecks& check, int64_t experts) {
  check.that(experts >= 1 && experts <= kMaxExperts, concat("1 to ", kMaxExperts, " experts"), experts,
             "Split the layer.");
}

inline void check_top_k(const TensorChecks& check, int64_t top_k, int64_t experts) {
  check.that(top_k >= 1 && top_k <= experts, concat("top_k in [1, ", experts, "]"), top_k,
             "Choose at least one expert and at most all.");
}

// fp32 results, or fp64 for fp64 inputs.
inline ScalarType weights_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The three stacks of one layer.
struct ExpertTensors {
  const std::optional<Tensor>& gate;
  const Tensor &up, &down;
  const std::optional<Tensor>&gate_scale, &up_scale, &down_scale;
  std::optional<int64_t> bits = std::nullopt;  // of packed stacks
  int64_t layout = kLayoutGuardedPlanes;

  int64_t experts() const { return up.size(0); }
  int64_t inner() const { return bits ? up_scale->size(1) : up.size(1); }

  void check(const TensorChecks& check, const Tensor& x) const {
    if (bits) return check_packed(check, x);
    check.dim("w_up", up, 3, "[E, I, H]");
    check.dim("w_down", down, 3, "[E, H, I]");
    check_expert_count(check, experts());
    check.that(inner() >= 1 && inner() <= INT32_MAX - 32, "w_up.size(1) >= 1", inner(),
               "An expert has an inner size.");
    check_stack(check, "w_up", up, x, {experts(), inner(), x.size(1)}, "[E, I, H]");
    check_stack(check, "w_down", down, x, {experts(), x.size(1), inner()}, "[E, H, I]");
    check_scale(check, "w_up_scale", up_scale, up);
    check_scale(check, "w_down_scale", down_scale, down);
    check.that(down.scalar_type() == up.scalar_type(),
               concat("w_down of dtype ", dtype_text(up.scalar_type())), dtype_text(down.scalar_type()),
               "The weights of a layer have one dtype.");
    if (gate) {
      check_stack(check, "w_gate", *gate, x, {experts(), inner(), x.size(1)}, "[E, I, H]");
      check.that(gate->scalar_type() == up.scalar_type(),
                 concat("w_gate of dtype ", dtype_text(up.scalar_type())), dtype_text(gate->scalar_type()),
                 "The weights of a layer have one dtype.");
      check_scale(check, "w_gate_scale", gate_scale, *gate);
    } else {
      check.that(!gate_scale, "no w_gate_scale without w_gate", "one", "Leave it out.");
    }
  }

  void set(MoeExpertsParams& p) const {
    if (gate) p.gate = matrices(*gate, gate_scale);
    p.up = matrices(up, up_scale);
    p.down = matrices(down, down_scale);
    p.experts = int32_t(experts());
    p.inner = int32_t(inner());
    p.bits = int32_t(bits.value_or(0));
  }

 private:
  void check_packed(const TensorChecks& check, const Tensor& x) const {
    check_bits(check, *bits);
    check.that(layout == kLayoutGuardedPlanes, concat("layout ", kLayoutGuardedPlanes, " (guarded planes)"),
               layout, "Pack the codes with tranche.moe.pack_experts.");
    check.dtype("x", x, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16});
    check.dim("w_up", up, 2, "[E, bytes]");
    check_expert_count(check, experts());
    check.that(up_scale.has_value(), "w_up_scale for packed weights", "none",
               "Each output of an expert has its scale.");
    check.dim("w_up_scale", *up_scale, 2, "[E, I]");
    check.that(inner() >= 1 && inner() <= INT32_MAX - 32, "w_up_scale.size(1) >= 1", inner(),
               "An expert has an inner size.");
    check_packed_stack(check, "w_up", up, "w_up_scale", up_scale, x, inner(), x.size(1));
    check_packed_stack(check, "w_down", down, "w_down_scale", down_scale, x, x.size(1), inner());
    if (gate) {
      check_packed_stack(check, "w_gate", *gate, "w_gate_scale", gate_scale, x, inner(), x.size(1));
    } else {
      check.that(!gate_scale, "no w_gate_scale without w_gate", "one", "Leave it out.");
    }
  }

  void check_packed_stack(const TensorChecks& check, Phrase name, const Tensor& stack, Phrase scale_name,
                          const std::optional<Tensor>& scale, const Tensor& x, int64_t rows,
                          int64_t columns) const {
    check.exactly(name, stack, ScalarType::Byte, {experts(), packed_bytes(rows, columns)}, "[E, bytes]",
                  "x and w_up_scale", x);
    check.that(reinterpret_cast<uintptr_t>(stack.const_data_ptr()) % 16 == 0,
               concat(name, " aligned to 16 bytes"), "a view that is not",
               concat("Call ", name, ".clone()."));
    check.that(scale.has_value(), concat(scale_name, " for packed weights"), "none",
               "Each output of an expert has its scale.");
    check.exactly(scale_name, *scale, ScalarType::Float, {experts(), rows}, "[E, rows]", "its weights", x);
  }

  static void check_stack(const TensorChecks& check, Phrase name, const Tensor& stack, const Tensor& x,
                          std::initializer_list<int64_t> shape, const char* shape_name) {
    check.dim(name, stack, 3, shape_name);
    check.dtype(name, stack, {x.scalar_type(), ScalarType::Char});
    check.same_device(name, stack, "x", x);
    int64_t i = 0;
    for (int64_t size : shape) {
      check.equal(concat(name, ".size(", i, ")"), stack.size(i), "the size that x and w_up give", size,
                  concat(name, " is ", shape_name, " and x is [T, H]."));
      ++i;
    }
    check.last_contiguous(name, stack);
  }

  static void check_scale(const TensorChecks& check, Phrase name, const std::optional<Tensor>& scale,
                          const Tensor& stack) {
    const bool int8 = stack.scalar_type() == ScalarType::Char;
    check.that(scale.has_value() == int8, concat(int8 ? "" : "no ", name, int8 ? " for int8 weights" : ""),
               int8 ? "none" : "one", "int8 weights come with one scale for each row, others with none.");
    if (scale) {
      check.exactly(name, *scale, ScalarType::Float, {stack.size(0), stack.size(1)}, "[E, rows]",
                    "its weights", stack);
    }
  }

  static ExpertMatrices matrices(const Tensor& stack, const std::optional<Tensor>& scale) {
    return {stack.const_data_ptr(), data<float>(scale), {stack.stride(0), stack.stride(1)}};
  }
};

inline void check_residual(const TensorChecks& check, const std::optional<Tensor>& residual,
                           const Tensor& x) {
  if (!residual) return;
  check.dim("residual", *residual, 2, "[T, H]");
  check.dtype("residual", *residual, {x.scalar_type()});
  check.same_device("residual", *residual, "x", x);
  check.last_contiguous("residual", *residual);
  check.same_sizes("residual", *residual, "x", x, 2, "It is added to the outputs.");
}

struct Plan {
  Tensor offsets, slots;
};

inline Plan make_plan(const Tensor& ids, int64_t experts) {
  Plan plan{empty_on(ids, {experts + 1}, ScalarType::Int), empty_on(ids, {ids.numel()}, ScalarType::Int)};
  MoePlanParams params{};
  params.ids = data<int32_t>(ids);
  params.offsets = mutable_data<int32_t>(plan.offsets);
  params.slots = mutable_data<int32_t>(plan.slots);
  params.count = int32_t(ids.numel());
  params.experts = int32_t(experts);
  RUN_KERNEL(moe_plan, params, ids, plan.offsets, plan.slots);
  return plan;
}

// The plan, where the kernels of the experts do not make it on their way.
inline std::optional<Plan> plan_ahead([[maybe_unused]] const Tensor& ids, [[maybe_unused]] int64_t experts) {
#if defined(TRANCHE_BACKEND_CPU)
  return make_plan(ids, experts);
#else
  return std::nullopt;
#endif
}

inline std::optional<Tensor> tensor_of(const std::optional<Plan>& plan, Tensor Plan::* member) {
  return plan ? std::optional<Tensor>((*plan).*member) : std::nullopt;
}

inline void check_ids(const TensorChecks& check, const Tensor& ids, int64_t experts) {
  const HostValues<int32_t> values(ids);
  for (int64_t i = 0; i < ids.numel(); ++i) {
    check.index(values[i] >= 0 && values[i] < experts,
                concat("topk_ids[", i / ids.size(1), ", ", i % ids.size(1), "] in [0, ", experts, ")"),
                values[i], "An id is the number of an expert.");
  }
}

}  // namespace tranche
