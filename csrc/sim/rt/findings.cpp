#include "sim/rt/findings.h"

#include <algorithm>
#include <cstdio>

#include "sim/rt/memory_map.h"
#include "sim/rt/symbols.h"

namespace tranche::sim {

namespace {

constexpr size_t kMaxFindings = 32;
// A finding's first words name its kind; the rest has addresses and numbers that vary from thread to thread.
constexpr size_t kKindLength = 16;

std::string place_text(Site site, uintptr_t pc) {
  if (site.file != nullptr) return short_path(site.file) + ":" + std::to_string(site.line);
  if (pc != 0) return source_line(pc);
  return "";
}

}  // namespace

std::string index_text(uint3 index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
}

std::string thread_text(uint32_t id) {
  const uint3 shape = machine.launch.block;
  return index_text({id % shape.x, id / shape.x % shape.y, id / shape.x / shape.y});
}

std::string mask_text(uint32_t mask) {
  char text[16];
  snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

std::string address_text(const Block& block, uintptr_t address) {
  const SharedShadow& shared = block.shared;
  if (!shared.contains(address)) return global_address_text(address);
  const size_t offset = address - shared.low;
  if (offset < SharedShadow::kStaticOffset - 2048) {
    return "byte " + std::to_string(long(offset) - long(SharedShadow::kDynamicOffset)) +
           " of the dynamic shared memory (" + std::to_string(machine.launch.dynamic_smem) + " bytes)";
  }
  const StaticShared* nearest = nullptr;
  for (const StaticShared& variable : machine.launch.statics) {
    if (nearest == nullptr || variable.offset <= offset) nearest = &variable;
  }
  if (nearest == nullptr) return "shared memory outside every variable";
  return "byte " + std::to_string(long(offset) - long(nearest->offset)) + " of shared `" + nearest->name +
         "` (" + std::to_string(nearest->bytes) + " bytes)";
}

uintptr_t widen_pc(uint32_t low, uintptr_t near) {
  uintptr_t pc = (near & ~uintptr_t(0xffffffffu)) | low;
  if (pc > near && pc - near > 0x80000000u) pc -= uintptr_t(1) << 32;
  if (near > pc && near - pc > 0x80000000u) pc += uintptr_t(1) << 32;
  return pc;
}

void report(const Thread* thread, const std::string& what, Site site, uintptr_t pc,
            const std::string& other_words, uintptr_t other_pc) {
  Launch& launch = machine.launch;
  for (Finding& known : launch.findings) {
    const bool same_place = known.pc == pc && known.site.line == site.line && known.site.file == site.file;
    if (same_place && known.what.compare(0, kKindLength, what, 0, kKindLength) == 0) {
      ++known.count;
      return;
    }
  }
  Finding finding;
  finding.what = what;
  finding.site = site;
  finding.pc = pc;
  finding.other = other_words;
  finding.other_pc = other_pc;
  if (thread != nullptr) {
    finding.has_thread = true;
    finding.block = thread->block->index;
    finding.thread = thread->index;
  }
  launch.findings.push_back(std::move(finding));
  // One source line may be several instructions; those are merged when the lines are known.
  if (launch.findings.size() >= kMaxFindings && current != nullptr) stop_kernel();
}

void report_and_stop(const Thread* thread, const std::string& what, Site site, uintptr_t pc) {
  report(thread, what, site, pc);
  stop_kernel();
}

std::string format_report(const Launch& launch) {
  struct Entry {
    std::string place, kind, text;
    int count;
  };
  std::vector<Entry> entries;
  for (const Finding& finding : launch.findings) {
    Entry entry{place_text(finding.site, finding.pc), finding.what.substr(0, kKindLength), "", finding.count};
    entry.text = finding.what + finding.other;
    if (finding.other_pc != 0) entry.text += " at " + source_line(finding.other_pc);
    if (!entry.place.empty()) entry.text = "at " + entry.place + ": " + entry.text;
    if (finding.has_thread) {
      entry.text =
          "block " + index_text(finding.block) + " thread " + index_text(finding.thread) + " " + entry.text;
    }
    const auto known = std::find_if(entries.begin(), entries.end(), [&](const Entry& other) {
      return other.place == entry.place && other.kind == entry.kind;
    });
    if (known == entries.end()) {
      entries.push_back(std::move(entry));
    } else {
      known->count += entry.count;
    }
  }
  std::string text = "tranche simulator: kernel " + std::string(launch.name) + ": " +
                     std::to_string(entries.size()) + (entries.size() == 1 ? " finding" : " findings") +
                     " (seed " + std::to_string(machine.seed) + ", launch " + std::to_string(launch.number) +
                     (launch.stopped ? "; stopped before the end)" : ")");
  int number = 0;
  for (const Entry& entry : entries) {
    text += "\n  " + std::to_string(++number) + ". " + entry.text;
    if (entry.count > 1) text += " [and " + std::to_string(entry.count - 1) + " more times here]";
  }
  return text;
}

}  // namespace tranche::sim
