// The draft head's gate on the CPU.
#include "core/dispatch.h"
#include "core/isa.h"
#include "moe/moe_draft.h"
#include "moe/moe_logits_cpu.h"

namespace tranche::cpu::TRANCHE_ISA {
namespace {

// As the tensor's type would hold it.
TRANCHE_INLINE double rounded(double x, const double*) { return x; }
template <class T>
TRANCHE_INLINE float rounded(float x, const T*) {
  return to_float(from_float<T>(x));
}

template <class Engine, class T>
class Gate {
 public:
  using Compute = typename Engine::Compute;

  explicit Gate(const MoeDraftParams& p)
      : p_(p),
        ranking_bytes_(round_up(int64_t(p.tokens) * p.experts * int64_t(sizeof(Compute)), 64)),
        logits_(p.x, p.x_stride, p.router, p.router_stride, p.tokens, p.rows, p.hidden,
                p.workspace ? static_cast<char*>(p.workspace) + ranking_bytes_ : nullptr) {}

  int64_t bytes() const { return ranking_bytes_ + logits_.bytes(); }

  void run() const {
    logits_.run();
    Compute* plain = static_cast<Compute*>(p_.coefficients);
    Compute* contrast = plain + int64_t(p_.tokens) * p_.top_k;
    parallel_for(p_.tokens, [&](int64_t t) {
      token(t, logits_.of(t), plain + t * p_.top_k, p_.outputs > 1 ? contrast + t * p_.top_k : nullptr);
    });
  }

 private:
  void token(int64_t t, Compute* logits, Compute* plain, Compute* contrast) const {
    int32_t* ids = p_.ids + t * p_.top_k;
    if (p_.variant == DraftVariant::star) {
      const Compute first = logits[0] > logits[1] ? 1 : 0;
      ids[0] = 0, ids[1] = 1;
      plain[0] = first, plain[1] = 1 - first;
      contrast[0] = 1 - first, contrast[1] = first;
      return;
    }
    if (contrast) {
      for (int k = 2; k < p_.top_k; ++k) contrast[k] = 0;
      const T* type = nullptr;
      const Compute l0 = logits[p_.experts], l1 = logits[p_.experts + 1];
      const Compute sign = rounded(l0, type) > rounded(l1, type) ? 1 : -1;
      softmax_of_two(l0, l1, contrast);
      contrast[0] *= sign;
      contrast[1] *= -sign;
    }
    if (p_.variant == DraftVariant::jakiro) {
      ids[0] = 0, ids[1] = 1;
      softmax_of_two(logits[0], logits[1], plain);
      return;
    }
    MoeRouteParams route{};
    route.experts = p_.experts;
    route.top_k = p_.top_k;
    route.groups = route.top_groups = 1;
    route.score = RouteScore::softmax;
    route.renormalize = true;
    route.scale = 1.0f;
    Choice<Compute>(route, logits, static_cast<Compute*>(p_.workspace) + t * p_.experts).run(plain, ids);
  }

  static void softmax_of_two(Compute l0, Compute l1, Compute* out) {
    const Compute highest = l0 < l1 ? l1 : l0;
    const Compute e0 = exp_of(l0 - highest), e1 = exp_of(l1 - highest);
    out[0] = e0 / (e0 + e1);
    out[1] = e1 / (e0 + e1);
  }

  const MoeDraftParams& p_;
  int64_t ranking_bytes_;
  Logits<Engine, T> logits_;
};

template <class F>
TRANCHE_INLINE auto with_gate(const MoeDraftParams& p, const F& f) {
  return with_type<double, float, half, bf16>("moe_draft", p.type, [&](auto t) {
    using T = decltype(t);
    return f(Gate<typename LogitsEngine<T>::type, T>(p));
  });
}

}  // namespace

size_t moe_draft_workspace(const MoeDraftParams& p) {
  return with_gate(p, [](const auto& gate) { return size_t(gate.bytes()); });
}

void moe_draft(const MoeDraftParams& p) {
  with_gate(p, [&](const auto& gate) { gate.run(); });
}

}  // namespace tranche::cpu::TRANCHE_ISA

TRANCHE_CPU_ENTRY(size_t, moe_draft_workspace, MoeDraftParams)
TRANCHE_CPU_ENTRY(void, moe_draft, MoeDraftParams)
