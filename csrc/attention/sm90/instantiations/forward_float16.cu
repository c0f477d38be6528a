#include "attention/sm90/launch.cuh"
#include "attention/sm90/wide_launcher.h"

namespace fastgen::attention::sm90 {

static const bool kEntered = (forward_launcher<Half> = &try_forward_of_any_width<Half, &try_forward<Half>>, true);

}  // namespace fastgen::attention::sm90
