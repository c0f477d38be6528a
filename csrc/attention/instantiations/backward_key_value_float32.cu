#include "attention/launch.cuh"

namespace fastgen::attention {

template void launch_backward_key_value<float>(const BackwardParams&, void*);

}  // namespace fastgen::attention
