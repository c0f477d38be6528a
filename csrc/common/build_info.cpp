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

// The words of a text as a JSON list.
std::string listed(const char* words) {
  std::string text = "[";
  std::istringstream names(words);
  const char* separator = "";
  for (std::string name; names >> name; separator = ", ") text += separator + quoted(name);
  return text + "]";
}

std::string describe_build() {
  std::string text = "{\"version\": " + quoted(FASTGEN_VERSION) + ", \"torch\": " + quoted(FASTGEN_TORCH_VERSION);
  text += ", \"dtypes\": " + listed(FASTGEN_DTYPES);
#ifdef FASTGEN_CUDA_VERSION
  text += ", \"cuda\": " + quoted(FASTGEN_CUDA_VERSION);
  text += ", \"architectures\": " + listed(FASTGEN_CUDA_ARCHITECTURES);
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

// Keys: version (of fastgen), torch, dtypes (of the kernels), cuda (of nvcc; null without CUDA), architectures,
// compiler.
FASTGEN_EXPORTED const char* fastgen_build_info() {
  static const std::string text = describe_build();
  return text.c_str();
}
