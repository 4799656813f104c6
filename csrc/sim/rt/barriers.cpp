// __syncthreads and its voting forms, and named barriers.
#include "sim/rt/findings.h"
#include "sim/rt/order.h"

namespace tranche::sim {

namespace {

bool same_site(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0);
}

// A lane that goes to a barrier although others of its warp wait for it in a collective: neither ever ends.
void require_unclaimed(Thread& thread, const char* barrier, Site site) {
  const Warp& warp = *thread.warp;
  for (uint32_t i = 0; i < warp.pending_count; ++i) {
    const Rendezvous& other = warp.pending[i];
    if (!(other.mask >> thread.lane & 1)) continue;
    report_and_stop(&thread,
                    "divergence: is in " + std::string(barrier) + " while lanes " + mask_text(other.arrived) +
                        " of its warp wait for it in " + op_name(other.op) + " with mask " +
                        mask_text(other.mask) + " at line " + std::to_string(other.site.line),
                    site, 0);
  }
}

uint32_t complete_block_barrier(Block& block) {
  BarrierState& barrier = block.barrier;
  uint32_t result = barrier.sum;
  if (barrier.op == BlockOp::all) result = barrier.sum == barrier.arrived;
  if (barrier.op == BlockOp::any) result = barrier.sum != 0;
  barrier = {};
  begin_epoch(block);
  for (uint32_t w = 0; w < block.warp_count; ++w) {
    Warp& warp = block.warps[w];
    for (uint32_t lanes = warp.at_barrier; lanes != 0; lanes &= lanes - 1) {
      lane_of(warp, uint32_t(__builtin_ctz(lanes))).result = result;
    }
    wake(warp, warp.at_barrier);
    warp.at_barrier = 0;
  }
  ++machine.counters.barriers;
  machine.launch.idle_pauses = 0;
  return result;
}

}  // namespace

void begin_epoch(Block& block) {
  if (machine.next_epoch >= kMaxEpoch) {
    report_and_stop(current, "more block barriers in one launch than can be followed", {}, 0);
  }
  block.epoch = machine.next_epoch++;
  machine.launch.epoch_owner.push_back(block.linear);
  block.now = 1;
  block.named_used = false;
  for (uint32_t w = 0; w < block.warp_count; ++w) {
    block.warps[w].floor = 0;
    block.warps[w].partial = false;
  }
}

void barriers_after_exit(Thread& thread) {
  Block& block = *thread.block;
  if (block.barrier.arrived != 0 && block.barrier.arrived == block.threads_live)
    complete_block_barrier(block);
}

}  // namespace tranche::sim

using namespace tranche::sim;

uint32_t tranche_sim_block_barrier(BlockOp op, uint32_t predicate, Site site) {
  Thread& thread = *current;
  Block& block = *thread.block;
  require_unclaimed(thread, "__syncthreads", site);
  BarrierState& barrier = block.barrier;
  if (barrier.arrived == 0) {
    barrier.op = op;
    barrier.site = site;
  } else if (barrier.op != op || !same_site(barrier.site, site)) {
    report_and_stop(
        &thread,
        "divergence: is in a __syncthreads while other threads of the block wait in that of line " +
            std::to_string(barrier.site.line),
        site, 0);
  }
  barrier.sum += predicate;
  if (++barrier.arrived == block.threads_live) return complete_block_barrier(block);
  thread.wait = Wait::block;
  thread.site = site;
  thread.warp->at_barrier |= 1u << thread.lane;
  park();
  return uint32_t(thread.result);
}

void tranche_sim_named_barrier(uint32_t id, uint32_t count, bool wait, Site site) {
  Thread& thread = *current;
  Block& block = *thread.block;
  if (id == 0 || id >= kNamedBarriers || count == 0 || count % kWarpSize != 0) {
    report_and_stop(&thread,
                    "named barrier " + std::to_string(id) + " of " + std::to_string(count) +
                        " threads: ids are 1 to 15 and whole warps take part",
                    site, 0);
  }
  require_unclaimed(thread, "a named barrier", site);
  BarrierState& barrier = block.named[id];
  if (barrier.arrived != 0 && barrier.expected != count) {
    report_and_stop(&thread,
                    "divergence: expects " + std::to_string(count) + " threads at named barrier " +
                        std::to_string(id) + " where others expect " + std::to_string(barrier.expected),
                    site, 0);
  }
  const uint32_t warp = thread.warp->index;
  advance_label(block);
  barrier.expected = count;
  barrier.arrived_warps |= 1u << warp;
  barrier.labels[warp] = block.now;
  if (wait) barrier.waiting_warps |= 1u << warp;
  if (++barrier.arrived == count) {
    order_warps(block, barrier.waiting_warps, barrier.arrived_warps, barrier.labels);
    const uint32_t waiting_warps = barrier.waiting_warps;
    barrier = {};
    for (uint32_t rest = waiting_warps; rest != 0; rest &= rest - 1) {
      Warp& other = block.warps[__builtin_ctz(rest)];
      uint32_t lanes = 0;
      for (uint32_t live = other.live(); live != 0; live &= live - 1) {
        const Thread& sleeper = lane_of(other, uint32_t(__builtin_ctz(live)));
        if (sleeper.wait == Wait::named_barrier && sleeper.argument == id) lanes |= 1u << sleeper.lane;
      }
      wake(other, lanes);
    }
    machine.launch.idle_pauses = 0;
  } else if (wait) {
    thread.wait = Wait::named_barrier;
    thread.argument = id;
    thread.site = site;
    park();
  }
}
