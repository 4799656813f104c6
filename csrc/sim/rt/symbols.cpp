#include "sim/rt/symbols.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <map>

namespace tranche::sim {

namespace {

// A library's path goes into a shell command.
std::string quoted(const char* path) {
  std::string text = "'";
  for (const char* c = path; *c; ++c) text += *c == '\'' ? std::string("'\\''") : std::string(1, *c);
  return text + "'";
}

// The innermost frame outside the simulator's own headers: a kernel's line rather than that of a wrapper.
std::string ask_addr2line(const char* library, uintptr_t offset) {
  char tail[64];
  snprintf(tail, sizeof tail, " 0x%zx 2>/dev/null", size_t(offset));
  FILE* pipe = popen(("addr2line -i -e " + quoted(library) + tail).c_str(), "r");
  if (pipe == nullptr) return "";
  std::string first, chosen;
  char line[4096];
  while (fgets(line, sizeof line, pipe) != nullptr) {
    std::string text(line, strcspn(line, "\n"));
    if (const size_t note = text.find(" (discriminator"); note != std::string::npos) text.resize(note);
    if (text.compare(0, 2, "??") == 0 || text.find(":?") != std::string::npos) continue;
    if (first.empty()) first = text;
    const bool own = text.find("/sim/synchronization.h:") != std::string::npos ||
                     text.find("/sim/atomics.h:") != std::string::npos ||
                     text.find("/sim/intrinsics.h:") != std::string::npos ||
                     text.find("/sim/ptx.h:") != std::string::npos ||
                     text.find("/sim/vector_types.h:") != std::string::npos;
    if (chosen.empty() && !own) chosen = text;
  }
  pclose(pipe);
  return chosen.empty() ? first : chosen;
}

}  // namespace

std::string source_line(uintptr_t return_address) {
  static std::map<uintptr_t, std::string> known;  // launches are one at a time, so this needs no lock
  const auto found = known.find(return_address);
  if (found != known.end()) return found->second;

  const uintptr_t pc = return_address - 1;  // of the call
  Dl_info info{};
  std::string text;
  if (dladdr(reinterpret_cast<void*>(pc), &info) != 0 && info.dli_fname != nullptr) {
    const uintptr_t offset = pc - reinterpret_cast<uintptr_t>(info.dli_fbase);
    text = ask_addr2line(info.dli_fname, offset);
    if (text.empty()) {
      char number[32];
      const bool named = info.dli_sname != nullptr;
      snprintf(number, sizeof number, "+0x%zx",
               size_t(named ? pc - reinterpret_cast<uintptr_t>(info.dli_saddr) : offset));
      text = std::string(named ? info.dli_sname : info.dli_fname) + number;
    }
  } else {
    text = "unknown code";
  }
  return known[return_address] = text;
}

}  // namespace tranche::sim
