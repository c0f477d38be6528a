#include "attention/launch.cuh"

namespace fastgen::attention {

template void launch_backward_key_value<float>(BackwardParams, void*);

}  // namespace fastgen::attention
