#include "attention/launch.cuh"

namespace fastgen::attention {

template void launch_tangent<float>(TangentParams, void*);

}  // namespace fastgen::attention
