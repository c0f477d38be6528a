#include "attention/launch.cuh"

namespace fastgen::attention {

template void launch_backward_query<BFloat16>(BackwardParams, void*);

}  // namespace fastgen::attention
