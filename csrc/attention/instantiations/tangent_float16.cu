#include "attention/launch.cuh"

namespace fastgen::attention {

template void launch_tangent<Half>(TangentParams, void*);

}  // namespace fastgen::attention
