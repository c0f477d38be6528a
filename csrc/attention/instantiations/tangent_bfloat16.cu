#include "attention/launch.cuh"

namespace fastgen::attention {

template void launch_tangent<BFloat16>(const TangentParams&, void*);

}  // namespace fastgen::attention
