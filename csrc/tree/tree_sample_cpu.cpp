// A row is read two times, or three when something cuts it, a block of tokens at a time: the largest logit;
// the weight and the count of each interval of y, which tell where the cut falls; the kept weight of each
// block, and the few tokens of the interval that the cut divides. Then the drawn token's block is read once
// more. See tree_sampling.h for the rule.
#include "core/dispatch.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "tree/tree_row_cpu.h"
#include "tree/tree_sample.h"
#include "tree/tree_sampling.h"
#include "tree/tree_walk.h"

namespace tranche::cpu::TRANCHE_ISA {

namespace {

// A token that a cut may or may not keep.
struct Candidate {
  uint64_t rank, weight;
};

// What one task needs, beside its stack: a row's candidates and the kept weight of each block.
struct Scratch {
  Candidate* candidates;
  uint64_t* block_weights;

  static int64_t bytes(int64_t vocab) {
    return vocab * int64_t(sizeof(Candidate)) + (vocab / kRowBlock + 1) * int64_t(sizeof(uint64_t));
  }
  static Scratch at(void* base, int64_t task, int64_t vocab) {
    char* bytes_of_task = static_cast<char*>(base) + task * bytes(vocab);
    auto* candidates = reinterpret_cast<Candidate*>(bytes_of_task);
    return {candidates, reinterpret_cast<uint64_t*>(candidates + vocab)};
  }
};

constexpr float kDead = -200.0f;  // y of tokens without weight

// y, and the weight, of the tokens of one block; past the row's end y is dead.
struct Block {
  alignas(64) float x[kRowBlock];
  alignas(64) float y[kRowBlock];
  alignas(64) float e[kRowBlock];
  alignas(64) uint64_t weight[kRowBlock];
  int count;
};

template <class T>
TRANCHE_INLINE void load_block(Block& block, const T* row, int64_t first, int64_t vocab) {
  block.count = int(vocab - first < kRowBlock ? vocab - first : kRowBlock);
  row_to_float(row + first, block.x, block.count);
  for (int i = block.count; i % kWidth != 0; ++i) block.x[i] = -kInf;
}

TRANCHE_INLINE void weigh_block(Block& block, RowScale scale) {
  const Vec max = vset(scale.max), factor = vset(scale.factor), least = vset(kLeastExponent);
  const Vec dead = vset(kDead), zero = vset(0.0f);
  const int padded = (block.count + kWidth - 1) / kWidth * kWidth;
  for (int i = 0; i < padded; i += kWidth) {
    const Vec x = vload(block.x + i);
    const Vec y = vselect(veq(x, max), zero, vmul(vsub(x, max), factor));
    const Vec live = vselect(vlt(least, y), y, dead);
    vstore(block.y + i, live);
    vstore(block.e + i, vexp2<6>(live));
  }
  for (int i = 0; i < padded; ++i) block.weight[i] = fixed_point(block.e[i]);
}

// Where a cumulative sum reaches a limit: the index, and the sum before it.
struct Crossing {
  int64_t index;
  uint64_t before;
};

template <class Measure>
Crossing crossing(int64_t count, uint64_t limit, const Measure& measure) {
  uint64_t before = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t here = measure(i);
    if (before + here >= limit) return {i, before};
    before += here;
  }
  return {count, before};
}

// The rank of the candidate at which the sum of `measure`, in the order of ranks, reaches `limit` (which it
// does). Leaves the candidates partly ordered.
template <class Measure>
uint64_t rank_at(Candidate* candidates, int64_t count, uint64_t limit, const Measure& measure) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const uint64_t a = candidates[low].rank, b = candidates[(low + high) / 2].rank,
                   c = candidates[high - 1].rank;
    const uint64_t smaller = a < b ? a : b, larger = a < b ? b : a;
    const uint64_t pivot = c < smaller ? smaller : (c < larger ? c : larger);
    // No two ranks are equal: of three and more candidates the pivot goes left and the larger one of its
    // three stays right. Of two, the pivot may be the larger, and nothing stays right.
    int64_t split = low;
    uint64_t left = 0;
    for (int64_t i = low; i < high; ++i) {
      if (candidates[i].rank > pivot) continue;
      const Candidate moved = candidates[i];
      candidates[i] = candidates[split];
      candidates[split++] = moved;
      left += measure(moved);
    }
    if (limit > left) {
      limit -= left;
      low = split;
      continue;
    }
    if (split < high) {
      high = split;
      continue;
    }
    const int64_t first = candidates[low].rank < candidates[low + 1].rank ? low : low + 1;
    return limit <= measure(candidates[first]) ? candidates[first].rank
                                               : candidates[low + low + 1 - first].rank;
  }
  return candidates[low].rank;
}

uint64_t one(const Candidate&) { return 1; }
uint64_t its_weight(const Candidate& c) { return c.weight; }

// What the tokens of one interval of y add up to.
struct Bin {
  uint64_t weight, count;
};

template <class T>
class RowSampler {
 public:
  RowSampler(const T* row, int64_t vocab, RowScale scale, const Scratch& scratch)
      : row_(row),
        vocab_(vocab),
        blocks_((vocab + kRowBlock - 1) / kRowBlock),
        scale_(scale),
        scratch_(scratch) {}

  int64_t draw(const Sampling& sampling, uint64_t bits) {
    if (sampling.cuts_count(int32_t(vocab_)) || sampling.cuts_mass()) {
      cut(sampling);
    } else {
      sum_blocks(kBins);
    }
    for (int64_t i = 0; i < candidate_count_; ++i) {
      const Candidate& c = scratch_.candidates[i];
      if (c.rank <= cut_) scratch_.block_weights[uint32_t(c.rank) / kRowBlock] += c.weight;
    }
    uint64_t total = 0;
    for (int64_t i = 0; i < blocks_; ++i) total += scratch_.block_weights[i];
    const uint64_t target = multiply_high(bits, total) + 1;
    const Crossing block = crossing(blocks_, target, [&](int64_t i) { return scratch_.block_weights[i]; });
    return block.index * kRowBlock + token_in_block(block.index * kRowBlock, target - block.before);
  }

 private:
  // Finds the rank of the last token that top-k and top-p keep.
  void cut(const Sampling& sampling) {
    Bin bins[kBins];
    fill(bins);
    uint64_t live = 0, kept = 0;
    for (const Bin& bin : bins) {
      live += bin.count;
      kept += bin.weight;
    }
    const bool by_count = sampling.cuts_count(int32_t(vocab_)) && uint64_t(sampling.top_k) < live;
    int64_t divided = kBins;  // the interval that the cut divides; those before it are kept whole
    if (by_count) {
      const uint64_t k = uint64_t(sampling.top_k);
      const Crossing at = crossing(kBins, k, [&](int64_t i) { return bins[i].count; });
      divided = at.index;
      sum_blocks(divided);
      cut_ = rank_at(scratch_.candidates, candidate_count_, k - at.before, one);
      kept = 0;
      for (int64_t i = 0; i < divided; ++i) kept += bins[i].weight;
      for (int64_t i = 0; i < candidate_count_; ++i) {
        if (scratch_.candidates[i].rank <= cut_) kept += scratch_.candidates[i].weight;
      }
    }
    if (sampling.cuts_mass()) {
      const uint64_t limit = top_p_limit(sampling.top_p, kept);
      const Crossing at = crossing(kBins, limit, [&](int64_t i) { return bins[i].weight; });
      if (at.index != divided) sum_blocks(at.index);
      divided = at.index;
      cut_ = rank_at(scratch_.candidates, candidate_count_, limit - at.before, its_weight);
    }
    if (divided == kBins) sum_blocks(kBins);
  }

  void fill(Bin (&bins)[kBins]) {
    // Two sets, so that an addition rarely waits for the one before; dead tokens go to a bin past the end.
    Bin sets[2][kBins + 1];
    for (auto& set : sets) {
      for (Bin& bin : set) bin = {0, 0};
    }
    int32_t bin[kRowBlock];
    for (int64_t first = 0; first < vocab_; first += kRowBlock) {
      load_block(block_, row_, first, vocab_);
      weigh_block(block_, scale_);
      for (int i = 0; i < block_.count; ++i) {
        const int32_t found = bin_of(block_.y[i]);
        bin[i] = found < kBins ? found : kBins;
      }
      for (int i = 0; i < block_.count; ++i) {
        Bin& here = sets[i % 2][bin[i]];
        here.weight += block_.weight[i];
        ++here.count;
      }
    }
    for (int i = 0; i < kBins; ++i) {
      bins[i] = {sets[0][i].weight + sets[1][i].weight, sets[0][i].count + sets[1][i].count};
    }
  }

  // Per block the weight of the intervals before `divided`, and as candidates the tokens of that interval.
  void sum_blocks(int64_t divided) {
    candidate_count_ = 0;
    // y of the intervals kept whole is above -divided / 16 (an interval holds its end nearer to 0).
    const float whole = -float(divided) / kBinsPerOctave, end = -float(divided + 1) / kBinsPerOctave;
    for (int64_t b = 0; b < blocks_; ++b) {
      load_block(block_, row_, b * kRowBlock, vocab_);
      weigh_block(block_, scale_);
      uint64_t sum = 0;
      int found = 0;
      for (int i = 0; i < block_.count; ++i) {
        sum += block_.y[i] > whole ? block_.weight[i] : 0;
        found |= int(block_.y[i] <= whole) & int(block_.y[i] > end);
      }
      scratch_.block_weights[b] = sum;
      if (!found || divided >= kBins) continue;
      for (int i = 0; i < block_.count; ++i) {
        if (block_.y[i] > whole || block_.y[i] <= end) continue;
        const uint64_t place = rank(block_.x[i], uint32_t(b * kRowBlock + i));
        scratch_.candidates[candidate_count_++] = {place, block_.weight[i]};
      }
    }
  }

  int64_t token_in_block(int64_t first, uint64_t target) {
    load_block(block_, row_, first, vocab_);
    weigh_block(block_, scale_);
    const auto kept = [&](int64_t i) {
      return rank(block_.x[i], uint32_t(first + i)) <= cut_ ? block_.weight[i] : 0;
    };
    return crossing(block_.count, target, kept).index;
  }

  const T* row_;
  int64_t vocab_, blocks_;
  RowScale scale_;
  Scratch scratch_;
  int64_t candidate_count_ = 0;
  uint64_t cut_ = ~uint64_t(0);
  Block block_;
};

template <class T>
int64_t sample_row(const T* row, int64_t vocab, const Sampling& sampling, uint64_t bits,
                   const Scratch& scratch) {
  const float max = largest(row, vocab);
  if (sampling.greedy() || !(max > -kInf)) return first_largest(row, vocab, max);
  RowSampler<T> sampler(row, vocab, {max, kLog2E / sampling.temperature}, scratch);
  return sampler.draw(sampling, bits);
}

int32_t child_with(const TreeSampleParams& p, int64_t b, int32_t node, int32_t count, int64_t token) {
  if (p.tokens == nullptr) return -1;
  const int64_t* tokens = p.tokens + b * p.nodes;
  const int32_t* parents = p.parent + b * p.nodes;
  for (int32_t i = node + 1; i < count; ++i) {
    if (tokens[i] == token && parent_of(parents, i) == node) return i;
  }
  return -1;
}

template <class T>
void one_sequence(const TreeSampleParams& p, int64_t b, const Scratch& scratch) {
  const int32_t count = p.n_nodes == nullptr ? 1 : clamped_count(p.n_nodes[b], p.nodes);
  const Sampling sampling = {p.temperature[b], p.top_p[b], p.top_k[b]};
  int32_t* path = p.path == nullptr ? nullptr : p.path + b * p.nodes;
  int32_t node = count > 0 ? 0 : -1, steps = 0;
  int64_t token = -1;
  while (node >= 0) {
    if (path != nullptr) path[steps] = node;
    const T* row = static_cast<const T*>(p.logits) + b * p.logits_stride[0] + node * p.logits_stride[1];
    const uint64_t bits = random_bits(uint64_t(p.seed[b]), uint64_t(p.position[b]) + uint64_t(steps));
    token = sample_row(row, p.vocab, sampling, bits, scratch);
    node = child_with(p, b, node, count, token);
    ++steps;
  }
  p.next_token[b] = token;
  if (p.length != nullptr) p.length[b] = steps > 0 ? steps - 1 : 0;
  for (int32_t i = steps; path != nullptr && i < p.nodes; ++i) path[i] = -1;
}

int64_t task_count(const TreeSampleParams& p) {
  const int64_t threads = num_threads();
  return p.batch < threads ? p.batch : threads;
}

}  // namespace

TreeSampleSpace tree_sample_space(const TreeSampleParams& p) {
  return {0, task_count(p) * Scratch::bytes(p.vocab)};
}

void tree_sample(const TreeSampleParams& p) {
  const int64_t tasks = task_count(p);
  with_type<float, half, bf16>("tree_sample", p.type, [&](auto t) {
    parallel_for(tasks, [&](int64_t task) {
      const Scratch scratch = Scratch::at(p.scratch, task, p.vocab);
      for (int64_t b = task; b < p.batch; b += tasks) one_sequence<decltype(t)>(p, b, scratch);
    });
  });
}

}  // namespace tranche::cpu::TRANCHE_ISA

TRANCHE_CPU_ENTRY(TreeSampleSpace, tree_sample_space, TreeSampleParams)
TRANCHE_CPU_ENTRY(void, tree_sample, TreeSampleParams)
