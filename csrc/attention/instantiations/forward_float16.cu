#include "attention/launch.cuh"

namespace fastgen::attention {

template void launch_forward<Half>(ForwardParams, void*);

}  // namespace fastgen::attention
