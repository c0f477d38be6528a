#include "attention/sm90/launch.cuh"

namespace fastgen::attention::sm90 {

static const bool kEntered = (forward_launcher<Half> = &try_forward<Half>, true);

}  // namespace fastgen::attention::sm90
