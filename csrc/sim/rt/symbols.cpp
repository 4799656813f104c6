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

// The innermost frame outside the headers that only wrap things: a kernel's line rather than that of a
// wrapper.
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
    const auto is_in = [&](const char* file) { return text.find(file) != std::string::npos; };
    const bool wrapper = is_in("/sim/synchronization.h:") || is_in("/sim/atomics.h:") ||
                         is_in("/sim/ptx.h:") || is_in("/sim/intrinsics.h:") ||
                         is_in("/sim/vector_types.h:") || is_in("/core/numeric.h:");
    if (chosen.empty() && !wrapper) chosen = text;
  }
  pclose(pipe);
  return short_path(chosen.empty() ? first : chosen);
}

}  // namespace

std::string short_path(const std::string& path) {
  static const std::string root = TRANCHE_SIM_ROOT;
  if (path.compare(0, root.size(), root) == 0) return path.substr(root.size());
  // a compiler cache may have made the path relative to the build's folder
  const size_t source = path.compare(0, 3, "../") == 0 ? path.rfind("/csrc/") : std::string::npos;
  return source == std::string::npos ? path : path.substr(source + 1);
}

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
