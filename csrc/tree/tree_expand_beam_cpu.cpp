// Each task streams one chunk of one row past the list of its k best so far: a vector of scores is looked at
// more closely only when one of them beats the worst on the list, which happens about k log(V/k) times.
//
// Lists are filled in ascending order of token (chunk, flat position), and only a greater score displaces:
// ties go to the lower one by themselves.
#include "core/dispatch.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "tree/tree_expand_beam.h"

namespace tranche::cpu::TRANCHE_ISA {

namespace {

constexpr int64_t kChunk = 32768;  // tokens per task, at absolute multiples
constexpr int kBlock = 128;        // scores per look

struct Entry {
  double score;  // a float's value, exactly, but for f64
  int64_t id;
};

// The k best of what was offered, in descending order.
struct BestList {
  Entry* entries;
  int k;
  int count = 0;

  bool full() const { return count == k; }
  double worst() const { return entries[k - 1].score; }

  void offer(double score, int64_t id) {
    if (score != score) score = -__builtin_inf();
    if (full() && !(score > worst())) return;
    int at = full() ? k - 1 : count++;
    for (; at > 0 && score > entries[at - 1].score; --at) entries[at] = entries[at - 1];
    entries[at] = {score, id};
  }
};

int64_t chunks_of(const TreeExpandBeamParams& p) { return (p.vocab + kChunk - 1) / kChunk; }

Entry* chunk_list(const TreeExpandBeamParams& p, int64_t row, int64_t chunk) {
  return static_cast<Entry*>(p.workspace) + (row * chunks_of(p) + chunk) * p.k;
}

TRANCHE_INLINE void offer_all(BestList& list, const float* scores, int n, float beam, int64_t first) {
  for (int i = 0; i < n; ++i) list.offer(scores[i] + beam, first + i);
}

template <class T>
void scan(const T* row, float beam, int64_t begin, int64_t end, BestList& list) {
  float values[kBlock];
  int64_t at = begin;
  for (; at < end && !list.full(); ++at) list.offer(to_float(row[at]) + beam, at);
  const Vec shift = vset(beam);
  for (; at + kBlock <= end; at += kBlock) {
    const float* block;
    if constexpr (sizeof(T) == 4) {
      block = row + at;
    } else {
      row_to_float(row + at, values, kBlock);
      block = values;
    }
    Vec best = vset(-kInf);
    for (int i = 0; i < kBlock; i += kWidth) best = vmax(vadd(vload(block + i), shift), best);
    if (vany(vlt(vset(float(list.worst())), best))) offer_all(list, block, kBlock, beam, at);
  }
  for (; at < end; ++at) list.offer(to_float(row[at]) + beam, at);
}

void scan(const double* row, double beam, int64_t begin, int64_t end, BestList& list) {
  for (int64_t at = begin; at < end; ++at) list.offer(row[at] + beam, at);
}

template <class T, class Score>
void one_chunk(const TreeExpandBeamParams& p, int64_t row, int64_t chunk) {
  const T* logprobs = static_cast<const T*>(p.logprobs) + (row / p.beams) * p.logprobs_stride[0] +
                      (row % p.beams) * p.logprobs_stride[1];
  const int64_t begin = chunk * kChunk, end = begin + kChunk < p.vocab ? begin + kChunk : p.vocab;
  BestList list{chunk_list(p, row, chunk), p.k};
  scan(logprobs, static_cast<const Score*>(p.beam_scores)[row], begin, end, list);
  for (int i = list.count; i < p.k; ++i) list.entries[i].id = -1;
}

template <class Score>
void one_sequence(const TreeExpandBeamParams& p, int64_t b) {
  Entry row_entries[kMaxBeam], beam_entries[kMaxBeam];
  BestList beam{beam_entries, p.k};
  for (int64_t beam_row = 0; beam_row < p.beams; ++beam_row) {
    const int64_t row = b * p.beams + beam_row;
    BestList best{row_entries, p.k};
    for (int64_t chunk = 0; chunk < chunks_of(p); ++chunk) {
      const Entry* list = chunk_list(p, row, chunk);
      for (int i = 0; i < p.k && list[i].id >= 0; ++i) best.offer(list[i].score, list[i].id);
    }
    for (int i = 0; i < p.k; ++i) {
      static_cast<Score*>(p.candidate_scores)[row * p.k + i] = Score(row_entries[i].score);
      p.candidate_tokens[row * p.k + i] = row_entries[i].id;
      beam.offer(row_entries[i].score, beam_row * p.k + i);
    }
  }
  for (int i = 0; i < p.k; ++i) {
    const int64_t flat = beam_entries[i].id;
    static_cast<Score*>(p.scores)[b * p.k + i] = Score(beam_entries[i].score);
    p.parent_beam[b * p.k + i] = int32_t(flat / p.k);
    p.tokens[b * p.k + i] = p.candidate_tokens[(b * p.beams) * p.k + flat];
  }
}

template <class T, class Score>
void expand(const TreeExpandBeamParams& p) {
  const int64_t chunks = chunks_of(p), tasks = int64_t(p.batch) * p.beams * chunks;
  const auto task = [&](int64_t i) { one_chunk<T, Score>(p, i / chunks, i % chunks); };
  const bool worth_threads = tasks > 1 && int64_t(p.batch) * p.beams * p.vocab >= 65536;
  if (worth_threads) {
    parallel_for(tasks, task);
  } else {
    for (int64_t i = 0; i < tasks; ++i) task(i);
  }
  for (int64_t b = 0; b < p.batch; ++b) one_sequence<Score>(p, b);
}

}  // namespace

size_t tree_expand_beam_workspace(const TreeExpandBeamParams& p) {
  return size_t(p.batch) * size_t(p.beams) * size_t(chunks_of(p)) * size_t(p.k) * sizeof(Entry);
}

void tree_expand_beam(const TreeExpandBeamParams& p) {
  with_type<double, float, half, bf16>("tree_expand_beam", p.type, [&](auto t) {
    using T = decltype(t);
    expand<T, typename compute_type<T>::type>(p);
  });
}

}  // namespace tranche::cpu::TRANCHE_ISA

TRANCHE_CPU_ENTRY(size_t, tree_expand_beam_workspace, TreeExpandBeamParams)
TRANCHE_CPU_ENTRY(void, tree_expand_beam, TreeExpandBeamParams)
