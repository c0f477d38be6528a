#include "attention/sm90/launch.cuh"
#include "attention/sm90/wide_launcher.h"

namespace fastgen::attention::sm90 {

static const bool kEntered =
    (forward_launcher<BFloat16> = &try_forward_of_any_width<BFloat16, &try_forward<BFloat16>>, true);

}  // namespace fastgen::attention::sm90
