#include "attention/sm90/forward_tangent_launch.cuh"

namespace fastgen::attention::sm90 {

static const bool kEntered = (forward_tangent_launcher<BFloat16> = &try_forward_tangent<BFloat16>, true);

}  // namespace fastgen::attention::sm90
