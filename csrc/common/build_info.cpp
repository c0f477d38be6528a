// What a compiled library was built from, as JSON text. In every library.
#include <sstream>
#include <string>

#include "common/exported.h"

namespace {

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    result += c;
  }
  return result + "\"";
}

std::string describe_build() {
  std::string text = "{\"version\": " + quoted(FASTGEN_VERSION) + ", \"torch\": " + quoted(FASTGEN_TORCH_VERSION);
#ifdef FASTGEN_CUDA_VERSION
  text += ", \"cuda\": " + quoted(FASTGEN_CUDA_VERSION) + ", \"architectures\": [";
  std::istringstream names(FASTGEN_CUDA_ARCHITECTURES);
  const char* separator = "";
  for (std::string name; names >> name; separator = ", ") text += separator + quoted(name);
  text += "]";
#else
  text += ", \"cuda\": null, \"architectures\": []";
#endif
  return text + ", \"compiler\": " + quoted(__VERSION__) + "}";
}

}  // namespace

#ifdef __ELF__
// The version in a section of its own, which Python reads from the file: loading the library registers its operators.
__attribute__((section("fastgen_version"), used)) static const char kVersion[] = FASTGEN_VERSION;
#endif

// Keys: version (of fastgen), torch, cuda (of nvcc; null without CUDA), architectures, compiler.
FASTGEN_EXPORTED const char* fastgen_build_info() {
  static const std::string text = describe_build();
  return text.c_str();
}
