#include "attention/launch.cuh"

namespace fastgen::attention {

template void launch_backward_query<Half>(const BackwardParams&, void*);

}  // namespace fastgen::attention
