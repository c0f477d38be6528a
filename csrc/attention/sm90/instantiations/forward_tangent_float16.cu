#include "attention/sm90/forward_tangent_launch.cuh"

namespace fastgen::attention::sm90 {

static const bool kEntered = (forward_tangent_launcher<Half> = &try_forward_tangent<Half>, true);

}  // namespace fastgen::attention::sm90
