#include "attention/launch.cuh"

namespace fastgen::attention {

template void launch_forward<float>(ForwardParams, void*);

}  // namespace fastgen::attention
