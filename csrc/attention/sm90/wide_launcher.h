// The entry to the forward kernel of head dim 512 for sm_90a, as those of launcher.h.
#pragma once

#include "attention/sm90/launcher.h"

namespace fastgen::attention::sm90 {

// Launches it; false, with nothing launched, if it does not serve the problem.
template <typename T>
inline ForwardLauncher wide_forward_launcher = nullptr;

// What is entered as forward_launcher: the kernels of narrower heads (kOthers), then this one.
template <typename T, ForwardLauncher kOthers>
bool try_forward_of_any_width(const ForwardParams& p, void* stream) {
  if (kOthers(p, stream)) return true;
  const ForwardLauncher wide = wide_forward_launcher<T>;
  return wide != nullptr && wide(p, stream);
}

}  // namespace fastgen::attention::sm90
