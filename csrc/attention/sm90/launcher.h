// The entry to the kernels for sm_90a. Their instantiations, which are compiled for that architecture alone, set it; in
// a library without them it stays null.
#pragma once

#include <cstdlib>
#include <cstring>

#include "attention/params.h"

namespace fastgen::attention::sm90 {

using ForwardLauncher = bool (*)(const ForwardParams&, void*);

// Launches the forward pass; false, with nothing launched, if it does not serve the problem.
template <typename T>
inline ForwardLauncher forward_launcher = nullptr;

using BackwardLauncher = bool (*)(const BackwardParams&, void*);

// The same for the whole backward pass, without the gradient of a mask.
template <typename T>
inline BackwardLauncher backward_launcher = nullptr;

// Not taken by default until it has been measured: FASTGEN_SM90=1.
inline bool is_wanted() {
  const char* given = std::getenv("FASTGEN_SM90");
  return given != nullptr && std::strcmp(given, "1") == 0;
}

}  // namespace fastgen::attention::sm90
