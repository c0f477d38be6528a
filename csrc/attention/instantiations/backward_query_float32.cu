#include "attention/launch.cuh"

namespace fastgen::attention {

template void launch_backward_query<float>(BackwardParams, void*);

}  // namespace fastgen::attention
