// The router on the CPU: logits by the engines of the experts, then one token after the other.
#include "core/dispatch.h"
#include "core/isa.h"
#include "moe/moe_logits_cpu.h"

namespace tranche::cpu::TRANCHE_ISA {
namespace {

template <class Engine, class T>
class Route {
 public:
  using Compute = typename Engine::Compute;

  explicit Route(const MoeRouteParams& p)
      : p_(p),
        ranking_bytes_(round_up(int64_t(p.tokens) * p.experts * int64_t(sizeof(Compute)), 64)),
        logits_(p.x, p.x_stride, p.weight, p.weight_stride, p.tokens, p.experts, p.hidden,
                p.workspace ? static_cast<char*>(p.workspace) + ranking_bytes_ : nullptr) {}

  int64_t bytes() const { return ranking_bytes_ + logits_.bytes(); }

  void run() const {
    logits_.run();
    Compute* ranking = static_cast<Compute*>(p_.workspace);
    Compute* weights = static_cast<Compute*>(p_.weights);
    parallel_for(p_.tokens, [&](int64_t t) {
      Choice<Compute>(p_, logits_.of(t), ranking + t * p_.experts)
          .run(weights + t * p_.top_k, p_.ids + t * p_.top_k);
    });
  }

 private:
  const MoeRouteParams& p_;
  int64_t ranking_bytes_;
  Logits<Engine, T> logits_;
};

template <class F>
TRANCHE_INLINE auto with_route(const MoeRouteParams& p, const F& f) {
  return with_type<double, float, half, bf16>("moe_route", p.type, [&](auto t) {
    using T = decltype(t);
    return f(Route<typename LogitsEngine<T>::type, T>(p));
  });
}

}  // namespace

size_t moe_route_workspace(const MoeRouteParams& p) {
  return with_route(p, [](const auto& route) { return size_t(route.bytes()); });
}

void moe_route(const MoeRouteParams& p) {
  with_route(p, [&](const auto& route) { route.run(); });
}

}  // namespace tranche::cpu::TRANCHE_ISA

TRANCHE_CPU_ENTRY(size_t, moe_route_workspace, MoeRouteParams)
TRANCHE_CPU_ENTRY(void, moe_route, MoeRouteParams)
