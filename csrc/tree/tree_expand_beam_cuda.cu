#include "tree/tree_expand_beam.cuh"

#include "core/dispatch.h"

namespace tranche::cuda {
namespace {

int tiles_of(const TreeExpandBeamParams& p) {
  return (p.vocab + TreeExpandBeamTraits::kTile - 1) / TreeExpandBeamTraits::kTile;
}

template <class T>
void launch_kernel(const TreeExpandBeamParams& p, void* stream) {
  // Sequences are the grid's third dimension: more than it holds go in several launches.
  constexpr int kMost = 65535;
  for (int first = 0; first < p.batch; first += kMost) {
    TreeExpandBeamParams part = p;
    part.batch = p.batch - first < kMost ? p.batch - first : kMost;
    const int64_t beams = int64_t(first) * p.beams, kept = int64_t(first) * p.k;
    part.logprobs = static_cast<const T*>(p.logprobs) + first * p.logprobs_stride[0];
    part.beam_scores = static_cast<const float*>(p.beam_scores) + beams;
    part.scores = static_cast<float*>(p.scores) + kept;
    part.parent_beam = p.parent_beam + kept;
    part.tokens = p.tokens + kept;
    part.candidate_scores = static_cast<float*>(p.candidate_scores) + beams * p.k;
    part.candidate_tokens = p.candidate_tokens + beams * p.k;
    part.workspace = static_cast<uint64_t*>(p.workspace) + beams * tiles_of(p) * p.k;
    part.arrivals = p.arrivals + first;
    const dim3 grid{unsigned(tiles_of(p)), unsigned(p.beams), unsigned(part.batch)};
    launch("tree_expand_beam", tree_expand_beam_kernel<T>, {grid, dim3(TreeExpandBeamTraits::kThreads)},
           stream, part);
  }
}

}  // namespace

size_t tree_expand_beam_workspace(const TreeExpandBeamParams& p) {
  return size_t(p.batch) * size_t(p.beams) * size_t(tiles_of(p)) * size_t(p.k) * sizeof(uint64_t);
}

void tree_expand_beam(const TreeExpandBeamParams& p, void* stream) {
  with_type<float, half, bf16>("tree_expand_beam", p.type,
                               [&](auto t) { launch_kernel<decltype(t)>(p, stream); });
}

}  // namespace tranche::cuda
