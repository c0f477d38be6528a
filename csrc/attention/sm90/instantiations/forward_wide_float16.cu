#include "attention/sm90/wide_launch.cuh"

namespace fastgen::attention::sm90 {

static const bool kEntered = (wide_forward_launcher<Half> = &try_forward_wide<Half>, true);

}  // namespace fastgen::attention::sm90
