// What lanes of a warp do together. The lane that arrives last does the work for all; the others find their
// result when they are resumed.
#include <algorithm>

#include "sim/rt/findings.h"
#include "sim/rt/order.h"

namespace tranche::sim {

namespace {

bool same_line(const Rendezvous& r, Site site) {
  return r.site.line == site.line && (r.site.file == site.file || strcmp(r.site.file, site.file) == 0);
}

bool is_aligned(WarpOp op) { return op >= WarpOp::ldmatrix; }

// Exited lanes count as arrived at __syncwarp, as they do at __syncthreads. Elsewhere they would owe a value.
bool may_have_exited(WarpOp op) { return op == WarpOp::sync; }

template <class F>
void for_each_lane(uint32_t lanes, F&& f) {
  for (; lanes != 0; lanes &= lanes - 1) f(uint32_t(__builtin_ctz(lanes)));
}

void run_shuffle(Warp& warp, const Rendezvous& r) {
  for_each_lane(r.arrived, [&](uint32_t lane) {
    Thread& thread = lane_of(warp, lane);
    const uint32_t width = thread.width, argument = thread.argument;
    if (width == 0 || width > kWarpSize || (width & (width - 1)) != 0) {
      report_and_stop(&thread, "shuffle width " + std::to_string(int(width)) + " is no power of two up to 32",
                      r.site, 0);
    }
    const uint32_t first = lane & ~(width - 1), last = first + width - 1;
    uint32_t source = lane;
    switch (r.op) {
      case WarpOp::shuffle:
        source = first | (argument & (width - 1));
        break;
      case WarpOp::shuffle_up:
        if (lane >= first + (argument & 31u)) source = lane - (argument & 31u);
        break;
      case WarpOp::shuffle_down:
        if (lane + (argument & 31u) <= last) source = lane + (argument & 31u);
        break;
      default:
        if ((lane ^ (argument & 31u)) <= last) source = lane ^ (argument & 31u);
    }
    if (r.arrived >> source & 1) {
      thread.result = lane_of(warp, source).value;
    } else {
      thread.result = ~uint64_t(0);
      report(&thread,
             "shuffle from an absent lane: reads lane " + std::to_string(source) +
                 ", which takes no part (mask " + mask_text(r.mask) + ")",
             r.site, 0);
    }
  });
}

void run_match(Warp& warp, const Rendezvous& r) {
  bool all_equal = true;
  const uint64_t one = lane_of(warp, uint32_t(__builtin_ctz(r.arrived))).value;
  for_each_lane(r.arrived, [&](uint32_t lane) {
    Thread& thread = lane_of(warp, lane);
    uint32_t equal = 0;
    for_each_lane(r.arrived, [&](uint32_t other) {
      if (lane_of(warp, other).value == thread.value) equal |= 1u << other;
    });
    all_equal = all_equal && thread.value == one;
    thread.result = equal;
  });
  if (r.op == WarpOp::match_all) {
    for_each_lane(r.arrived, [&](uint32_t lane) { lane_of(warp, lane).result = all_equal ? r.arrived : 0; });
  }
}

uint32_t combine(WarpOp op, uint32_t a, uint32_t b) {
  switch (op) {
    case WarpOp::reduce_add:
      return a + b;
    case WarpOp::reduce_min_u32:
      return std::min(a, b);
    case WarpOp::reduce_min_s32:
      return uint32_t(std::min(int32_t(a), int32_t(b)));
    case WarpOp::reduce_max_u32:
      return std::max(a, b);
    case WarpOp::reduce_max_s32:
      return uint32_t(std::max(int32_t(a), int32_t(b)));
    case WarpOp::reduce_and:
      return a & b;
    case WarpOp::reduce_or:
      return a | b;
    default:
      return a ^ b;
  }
}

void run(Warp& warp, const Rendezvous& r) {
  ++machine.counters.collectives;
  switch (r.op) {
    case WarpOp::sync:
      order_lanes(warp, r.arrived);
      return;
    case WarpOp::shuffle:
    case WarpOp::shuffle_up:
    case WarpOp::shuffle_down:
    case WarpOp::shuffle_xor:
      run_shuffle(warp, r);
      return;
    case WarpOp::match_any:
    case WarpOp::match_all:
      run_match(warp, r);
      return;
    case WarpOp::ldmatrix:
    case WarpOp::ldmatrix_trans:
      run_ldmatrix(warp, r.op == WarpOp::ldmatrix_trans);
      return;
    default:
      break;
  }
  if (is_aligned(r.op)) {
    run_mma(warp, r.op);
    return;
  }
  uint64_t result = 0;
  if (r.op == WarpOp::ballot || r.op == WarpOp::all || r.op == WarpOp::any) {
    uint32_t votes = 0;
    for_each_lane(r.arrived, [&](uint32_t lane) { votes |= uint32_t(lane_of(warp, lane).value) << lane; });
    result = r.op == WarpOp::ballot ? votes : r.op == WarpOp::all ? votes == r.arrived : votes != 0;
  } else {
    bool first = true;
    for_each_lane(r.arrived, [&](uint32_t lane) {
      const auto value = uint32_t(lane_of(warp, lane).value);
      result = first ? value : combine(r.op, uint32_t(result), value);
      first = false;
    });
  }
  for_each_lane(r.arrived, [&](uint32_t lane) { lane_of(warp, lane).result = result; });
}

void complete(Warp& warp, uint32_t index, uint32_t except) {
  const Rendezvous r = warp.pending[index];
  warp.pending[index] = warp.pending[--warp.pending_count];
  run(warp, r);
  wake(warp, r.arrived & ~except);
}

[[noreturn]] void stop_for_missing(Thread& thread, WarpOp op, uint32_t mask, uint32_t missing, Site site) {
  const auto lane = uint32_t(__builtin_ctz(missing));
  const bool exists = thread.warp->exists >> lane & 1;
  report_and_stop(&thread,
                  std::string(op_name(op)) + " with mask " + mask_text(mask) + " names lane " +
                      std::to_string(lane) +
                      (exists ? ", which has exited" : ", which the block does not have"),
                  site, 0);
}

// Two groups that each wait for a lane of the other.
void require_no_cycle(Thread& thread, const Rendezvous& mine) {
  const Warp& warp = *thread.warp;
  for (uint32_t i = 0; i < warp.pending_count; ++i) {
    const Rendezvous& other = warp.pending[i];
    if (&other == &mine || !(other.arrived & mine.mask) || !(mine.arrived & other.mask)) continue;
    report_and_stop(&thread,
                    "divergence: is in " + std::string(op_name(mine.op)) + " with mask " +
                        mask_text(mine.mask) + " while lanes " + mask_text(other.arrived) +
                        " wait for it in " + op_name(other.op) + " with mask " + mask_text(other.mask) +
                        " at line " + std::to_string(other.site.line),
                    mine.site, 0);
  }
  if (const uint32_t stuck = warp.at_barrier & mine.mask; stuck != 0) {
    const Thread& other = lane_of(*thread.warp, uint32_t(__builtin_ctz(stuck)));
    report_and_stop(&thread,
                    "divergence: is in " + std::string(op_name(mine.op)) + " with mask " +
                        mask_text(mine.mask) + ", which names lane " + std::to_string(other.lane) +
                        ", which is in __syncthreads at line " + std::to_string(other.site.line),
                    mine.site, 0);
  }
}

void meet(Thread& thread, WarpOp op, uint32_t mask, Site site) {
  Warp& warp = *thread.warp;
  const uint32_t me = 1u << thread.lane;
  if (!(mask & me)) {
    report_and_stop(&thread,
                    std::string(op_name(op)) + " with mask " + mask_text(mask) +
                        ", which lacks the calling lane " + std::to_string(thread.lane),
                    site, 0);
  }
  const uint32_t expected = mask & warp.live();
  if (expected != mask) {
    const uint32_t missing = mask & ~warp.live();
    // A block whose size is no multiple of 32 may still name the whole warp, except where PTX wants it whole.
    const uint32_t fatal = is_aligned(op) ? missing : may_have_exited(op) ? 0 : missing & warp.exists;
    if (fatal != 0) stop_for_missing(thread, op, mask, fatal, site);
  }
  uint32_t index = 0;
  while (index < warp.pending_count) {
    const Rendezvous& r = warp.pending[index];
    if (r.op == op && r.mask == mask && same_line(r, site)) break;
    ++index;
  }
  Rendezvous& mine = warp.pending[index];
  if (index == warp.pending_count) {
    mine = {op, mask, 0, site};
    ++warp.pending_count;
  }
  mine.arrived |= me;
  if (mine.arrived == expected) {
    complete(warp, index, me);
    return;
  }
  thread.wait = Wait::warp;
  thread.op = op;
  thread.mask = mask;
  thread.site = site;
  require_no_cycle(thread, mine);
  park();
}

}  // namespace

void warp_after_exit(Thread& thread) {
  Warp& warp = *thread.warp;
  for (uint32_t i = 0; i < warp.pending_count;) {
    const Rendezvous& r = warp.pending[i];
    if (!(r.mask >> thread.lane & 1)) {
      ++i;
      continue;
    }
    if (!may_have_exited(r.op)) {
      Thread& waiter = lane_of(warp, uint32_t(__builtin_ctz(r.arrived)));
      stop_for_missing(waiter, r.op, r.mask, 1u << thread.lane, r.site);
    }
    if (r.arrived == (r.mask & warp.live())) {
      complete(warp, i, 0);
    } else {
      ++i;
    }
  }
}

const char* op_name(WarpOp op) {
  static const char* const names[] = {
      "__syncwarp",        "__shfl_sync",       "__shfl_up_sync",    "__shfl_down_sync",  "__shfl_xor_sync",
      "__ballot_sync",     "__all_sync",        "__any_sync",        "__match_any_sync",  "__match_all_sync",
      "__reduce_add_sync", "__reduce_min_sync", "__reduce_min_sync", "__reduce_max_sync", "__reduce_max_sync",
      "__reduce_and_sync", "__reduce_or_sync",  "__reduce_xor_sync", "ldmatrix",          "ldmatrix.trans",
      "mma.m16n8k8.bf16",  "mma.m16n8k8.f16",   "mma.m16n8k16.bf16", "mma.m16n8k16.f16",  "mma.m16n8k16.s8",
      "mma.m16n8k16.u8",   "mma.m16n8k32.s8",   "mma.m16n8k32.u8"};
  return names[size_t(op)];
}

}  // namespace tranche::sim

using namespace tranche::sim;

uint64_t tranche_sim_warp(WarpOp op, uint32_t mask, uint64_t value, uint32_t argument, uint32_t width,
                          Site site) {
  Thread& thread = *current;
  thread.value = value;
  thread.argument = argument;
  thread.width = width;
  meet(thread, op, mask, site);
  return thread.result;
}

uint32_t tranche_sim_live_lanes() { return current->warp->live(); }

Word4Result tranche_sim_ldmatrix(WarpOp op, uint32_t matrices, const void* row, Site site) {
  Thread& thread = *current;
  thread.row = row;
  thread.argument = matrices;
  thread.pc = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  meet(thread, op, 0xffffffffu, site);
  const uint32_t* d = thread.d.u32;
  return {uint64_t(d[1]) << 32 | d[0], uint64_t(d[3]) << 32 | d[2]};
}

Float4Result tranche_sim_mma_f32(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                                 float d0, float d1, float d2, float d3, WarpOp op, Site site) {
  Thread& t = *current;
  t.a[0] = a0, t.a[1] = a1, t.a[2] = a2, t.a[3] = a3;
  t.b[0] = b0, t.b[1] = b1;
  t.d.f32[0] = d0, t.d.f32[1] = d1, t.d.f32[2] = d2, t.d.f32[3] = d3;
  meet(t, op, 0xffffffffu, site);
  return {t.d.f32[0], t.d.f32[1], t.d.f32[2], t.d.f32[3]};
}

Word4Result tranche_sim_mma_s32(uint64_t a01, uint64_t a23, uint64_t b01, uint64_t d01, uint64_t d23,
                                WarpOp op, Site site) {
  Thread& t = *current;
  t.a[0] = uint32_t(a01), t.a[1] = uint32_t(a01 >> 32), t.a[2] = uint32_t(a23), t.a[3] = uint32_t(a23 >> 32);
  t.b[0] = uint32_t(b01), t.b[1] = uint32_t(b01 >> 32);
  t.d.u32[0] = uint32_t(d01), t.d.u32[1] = uint32_t(d01 >> 32);
  t.d.u32[2] = uint32_t(d23), t.d.u32[3] = uint32_t(d23 >> 32);
  meet(t, op, 0xffffffffu, site);
  const uint32_t* d = t.d.u32;
  return {uint64_t(d[1]) << 32 | d[0], uint64_t(d[3]) << 32 | d[2]};
}
