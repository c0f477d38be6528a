// The entry to the tangent kernel for sm_90a, as those of launcher.h.
#pragma once

#include "attention/sm90/launcher.h"

namespace fastgen::attention::sm90 {

using TangentLauncher = bool (*)(const TangentParams&, void*);

// Launches the tangent; false, with nothing launched, if it does not serve the problem.
template <typename T>
inline TangentLauncher tangent_launcher = nullptr;

}  // namespace fastgen::attention::sm90
