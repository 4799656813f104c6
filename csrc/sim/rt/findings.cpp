#include "sim/rt/findings.h"

#include <cstdio>

#include "sim/rt/memory_map.h"
#include "sim/rt/symbols.h"

namespace tranche::sim {

namespace {

constexpr size_t kMaxFindings = 16;

std::string place_text(Site site, uintptr_t pc) {
  if (site.file != nullptr) return std::string(site.file) + ":" + std::to_string(site.line);
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
  return "byte " + std::to_string(long(offset) - long(nearest->offset)) + " of shared `" + nearest->name + "` (" +
         std::to_string(nearest->bytes) + " bytes)";
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
    // The first words name the kind; the rest has addresses and numbers that vary from thread to thread.
    if (same_place && known.what.compare(0, 16, what, 0, 16) == 0) {
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
  if (launch.findings.size() >= kMaxFindings && current != nullptr) stop_kernel();
}

void report_and_stop(const Thread* thread, const std::string& what, Site site, uintptr_t pc) {
  report(thread, what, site, pc);
  stop_kernel();
}

std::string format_report(const Launch& launch) {
  std::string text = "tranche simulator: kernel " + std::string(launch.name) + ": " +
                     std::to_string(launch.findings.size()) +
                     (launch.findings.size() == 1 ? " finding" : " findings") + " (seed " +
                     std::to_string(machine.seed) + ", launch " + std::to_string(launch.number) +
                     (launch.stopped ? "; stopped before the end)" : ")");
  int number = 0;
  for (const Finding& finding : launch.findings) {
    text += "\n  " + std::to_string(++number) + ". ";
    if (finding.has_thread) {
      text += "block " + index_text(finding.block) + " thread " + index_text(finding.thread) + " ";
    }
    const std::string place = place_text(finding.site, finding.pc);
    if (!place.empty()) text += "at " + place + ": ";
    text += finding.what;
    if (!finding.other.empty()) text += finding.other;
    if (finding.other_pc != 0) text += " at " + source_line(finding.other_pc);
    if (finding.count > 1) text += " [and " + std::to_string(finding.count - 1) + " more times here]";
  }
  return text;
}

}  // namespace tranche::sim
