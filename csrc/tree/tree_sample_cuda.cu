#include "tree/tree_sample.cuh"

#include "core/dispatch.h"

namespace tranche::cuda {

namespace {

constexpr int kTile = TreeSampleTraits::kTile;

int32_t tiles_of(const TreeSampleParams& p) { return (p.vocab + kTile - 1) / kTile; }

// A chunk of one tile is the least latency; beyond about 512 blocks in all, more of them only wait.
int32_t chunks_of(const TreeSampleParams& p) {
  const int32_t share = p.batch < 512 ? 512 / p.batch : 1;
  return tiles_of(p) < share ? tiles_of(p) : share;
}

template <class T>
void run(const TreeSampleParams& p, void* stream) {
  const TreeSampleLaunch params = {p, tiles_of(p), chunks_of(p)};
  const int64_t tickets_at_once = int64_t(p.batch) * params.chunks;
  const unsigned blocks = unsigned(tickets_at_once < 1024 ? tickets_at_once : 1024);
  launch("tree_sample", tree_sample_kernel<T>, {dim3(blocks), dim3(TreeSampleTraits::kThreads)}, stream,
         params);
}

}  // namespace

TreeSampleSpace tree_sample_space(const TreeSampleParams& p) {
  return {SampleMemory::zeroed_bytes(p.batch, tiles_of(p)), SampleMemory::scratch_bytes(p.batch, p.vocab)};
}

void tree_sample(const TreeSampleParams& p, void* stream) {
  with_type<float, half, bf16>("tree_sample", p.type, [&](auto t) { run<decltype(t)>(p, stream); });
}

}  // namespace tranche::cuda
