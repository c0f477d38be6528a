#include "attention/sm90/launch.cuh"

namespace fastgen::attention::sm90 {

static const bool kEntered = (forward_launcher<BFloat16> = &try_forward<BFloat16>, true);

}  // namespace fastgen::attention::sm90
