#include "attention/sm90/backward_launch.cuh"

namespace fastgen::attention::sm90 {

static const bool kEntered = (backward_launcher<Half> = &try_backward<Half>, true);

}  // namespace fastgen::attention::sm90
