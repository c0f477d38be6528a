#include "core/report.h"

#include <dlfcn.h>

#include <cstdio>
#include <vector>

namespace fastgen::emulator {

namespace {

std::vector<std::string> lines_of(const std::string& command) {
  std::vector<std::string> lines;
  FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return lines;
  char buffer[4096];
  while (fgets(buffer, sizeof(buffer), pipe) != nullptr) {
    std::string line = buffer;
    while (!line.empty() && (line.back() == '\n' || line.back() == '\r')) line.pop_back();
    lines.push_back(line);
  }
  pclose(pipe);
  return lines;
}

// "void f<int>(A, B) [clone .isra.0]" -> "f<int>"
std::string short_name(std::string name) {
  for (const std::string space : {"(anonymous namespace)::", "{anonymous}::", "fastgen::emulator::", "fastgen::"}) {
    for (size_t at; (at = name.find(space)) != std::string::npos;) name.erase(at, space.size());
  }
  int depth = 0;
  size_t end = name.size();
  for (size_t i = 0; i < name.size(); ++i) {
    if (name[i] == '<') ++depth;
    if (name[i] == '>') --depth;
    if (name[i] == '(' && depth == 0) {
      end = i;
      break;
    }
  }
  size_t begin = 0;
  depth = 0;
  for (size_t i = 0; i < end; ++i) {
    if (name[i] == '<') ++depth;
    if (name[i] == '>') --depth;
    if (name[i] == ' ' && depth == 0) begin = i + 1;
  }
  return name.substr(begin, end - begin);
}

}  // namespace

std::string source_of(Site site) {
  Dl_info info = {};
  if (site == 0 || dladdr(reinterpret_cast<void*>(site), &info) == 0) return "an unknown place";
  char offset[32];
  // The instruction before the return address is the call.
  snprintf(offset, sizeof(offset), "0x%zx", static_cast<size_t>(site - reinterpret_cast<Site>(info.dli_fbase) - 1));
  const std::string fallback = std::string(info.dli_fname) + "+" + offset;
  const std::vector<std::string> lines =
      lines_of("addr2line -e '" + std::string(info.dli_fname) + "' -i -f -C " + offset + " 2>/dev/null");
  std::string text;
  for (size_t i = 0; i + 1 < lines.size(); i += 2) {
    std::string place = lines[i + 1].substr(0, lines[i + 1].find(" ("));
    if (place.starts_with("./")) place.erase(0, 2);
    // The twins and the launcher are not the kernel's business.
    if (place.starts_with("??") || place.find("tests/emulator/device/") != std::string::npos) continue;
    text += (text.empty() ? "" : ", from ") + place + " in " + short_name(lines[i]);
  }
  return text.empty() ? fallback : text;
}

std::string source_of(const Where& where) {
  return std::string(where.file_name()) + ":" + std::to_string(where.line()) + " in " +
         short_name(where.function_name());
}

}  // namespace fastgen::emulator
