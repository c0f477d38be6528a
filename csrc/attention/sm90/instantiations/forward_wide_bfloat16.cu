#include "attention/sm90/wide_launch.cuh"

namespace fastgen::attention::sm90 {

static const bool kEntered = (wide_forward_launcher<BFloat16> = &try_forward_wide<BFloat16>, true);

}  // namespace fastgen::attention::sm90
