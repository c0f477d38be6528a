// The entries to the tangent kernels for sm_90a, as those of launcher.h.
#pragma once

#include "attention/sm90/launcher.h"

namespace fastgen::attention::sm90 {

using TangentLauncher = bool (*)(const TangentParams&, void*);

// Launches the tangent; false, with nothing launched, if it does not serve the problem.
template <typename T>
inline TangentLauncher tangent_launcher = nullptr;

// The forward pass and its tangent together: out and lse are results.
struct ForwardTangentParams {
  Problem problem;
  Operand query, key, value;
  Tangents tangents;
  Result out, tangent_out;
  RowResult lse, tangent_lse;
};

using ForwardTangentLauncher = bool (*)(const ForwardTangentParams&, void*);

// The same for one kernel that gives both.
template <typename T>
inline ForwardTangentLauncher forward_tangent_launcher = nullptr;

}  // namespace fastgen::attention::sm90
