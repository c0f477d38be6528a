#include "attention/sm90/tangent_launch.cuh"

namespace fastgen::attention::sm90 {

static const bool kEntered = (tangent_launcher<Half> = &try_tangent<Half>, true);

}  // namespace fastgen::attention::sm90
