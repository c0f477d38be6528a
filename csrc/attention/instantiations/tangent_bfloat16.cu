#include "attention/launch.cuh"

namespace fastgen::attention {

template void launch_tangent<BFloat16>(TangentParams, void*);

}  // namespace fastgen::attention
