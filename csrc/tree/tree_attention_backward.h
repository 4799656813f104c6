// The backward pass of tree_attention: what a kernel of this op receives.
//
// With x = scale * <q, k>, s = softcap * tanh(x / softcap) (or x), p = exp(s - lse) over the slots a row sees
// and, under sinks, w = 1 / (1 + exp(sink - lse)) (else 1), so that out = w * sum of p v:
//   delta  = <grad_out, out>
//   grad_s = p * (w * (<grad_out, v> - delta) + grad_lse)
//   grad_x = grad_s * (1 - (s / softcap)^2)
//   grad_q = scale * sum of grad_x k,   grad_k = scale * sum of grad_x q,   grad_v = sum of w p grad_out
//
// A row is *broken* when its query, grad_out, lse, delta or grad_lse holds a NaN or an infinity (but a row
// with lse -inf has weights 0 and no gradient). Its grad_q is NaN, and so are grad_k and grad_v of the slots
// that it sees; nothing else is touched. A slot whose key holds a NaN or an infinity has weight 0 for the
// rows that are not broken.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tree/tree_attention.h"

namespace tranche {

struct TreeAttentionBackwardParams {
  TreeAttentionParams
      forward;           // as the forward pass got it; q_type == kv_type, out and lse are read and contiguous
  const void* grad_out;  // [B, N, Hq, D] contiguous, q_type
  const float* grad_lse;  // [B, N, Hq] contiguous, or null
  void* grad_q;           // [B, N, Hq, D] contiguous, q_type; or null: not wanted
  void* grad_k;           // the cache's shape, contiguous, q_type; or null
  void* grad_v;           // likewise; null iff grad_k is
  void* workspace;        // workspace_bytes(params), 256-byte aligned; or null if that is 0
};

namespace cpu {
size_t tree_attention_backward_workspace(const TreeAttentionBackwardParams&);
void tree_attention_backward(const TreeAttentionBackwardParams&);
}  // namespace cpu

namespace cuda {
size_t tree_attention_backward_workspace(const TreeAttentionBackwardParams&);
void tree_attention_backward(const TreeAttentionBackwardParams&, void* stream);
}  // namespace cuda

}  // namespace tranche
