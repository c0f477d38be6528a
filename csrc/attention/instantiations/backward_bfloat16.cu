#include "attention/launch.cuh"

namespace fastgen::attention {

template void launch_backward<BFloat16>(const BackwardParams&, void*);

}  // namespace fastgen::attention
