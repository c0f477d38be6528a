// The exception of launchers. Without <stdexcept>: nvcc parses its <string> three times for each instantiation file,
// which takes longer than all headers of a family.
#pragma once

#include <cstdio>
#include <exception>

namespace fastgen {

class Error : public std::exception {
 public:
  explicit Error(const char* message) { snprintf(message_, sizeof(message_), "%s", message); }
  Error(const char* call, const char* reason) { snprintf(message_, sizeof(message_), "%s: %s", call, reason); }
  const char* what() const noexcept override { return message_; }

 private:
  char message_[256];
};

}  // namespace fastgen
