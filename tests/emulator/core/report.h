// A finding, as an exception with the information to understand and replay it.
#pragma once

#include <source_location>
#include <stdexcept>
#include <string>

#include "core/stamp.h"

namespace fastgen::emulator {

using Where = std::source_location;

// The first line of a report is "emulator: <kind>".
namespace kind {
inline constexpr const char* kOutOfBounds = "out of bounds";
inline constexpr const char* kMisaligned = "misaligned";
inline constexpr const char* kUnwritten = "read of uninitialized memory";
inline constexpr const char* kRace = "race";
inline constexpr const char* kAsyncCopy = "unfinished asynchronous copy";
inline constexpr const char* kProduct = "unfinished matrix product";
inline constexpr const char* kProxy = "missing proxy fence";
inline constexpr const char* kDivergence = "divergence";
inline constexpr const char* kDeadlock = "deadlock";
inline constexpr const char* kExited = "exited thread";
inline constexpr const char* kMisuse = "misuse";
}  // namespace kind

class Finding : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// "csrc/common/reduce.cuh:32 in block_sum<256>, from csrc/latent/forward.cuh:71 in latent_forward<...>"
std::string source_of(Site site);
std::string source_of(const Where& where);

}  // namespace fastgen::emulator
