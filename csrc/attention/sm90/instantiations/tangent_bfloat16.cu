#include "attention/sm90/tangent_launch.cuh"

namespace fastgen::attention::sm90 {

static const bool kEntered = (tangent_launcher<BFloat16> = &try_tangent<BFloat16>, true);

}  // namespace fastgen::attention::sm90
