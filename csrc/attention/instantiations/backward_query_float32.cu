#include "attention/launch.cuh"

namespace fastgen::attention {

template void launch_backward_query<float>(const BackwardParams&, void*);

}  // namespace fastgen::attention
