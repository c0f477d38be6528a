#include "attention/sm90/backward_launch.cuh"

namespace fastgen::attention::sm90 {

static const bool kEntered = (backward_launcher<BFloat16> = &try_backward<BFloat16>, true);

}  // namespace fastgen::attention::sm90
