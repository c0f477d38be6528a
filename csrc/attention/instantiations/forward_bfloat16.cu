#include "attention/launch.cuh"

namespace fastgen::attention {

template void launch_forward<BFloat16>(ForwardParams, void*);

}  // namespace fastgen::attention
