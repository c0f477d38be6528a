#include "attention/launch.cuh"

namespace fastgen::attention {

template void launch_second_order<float>(SecondOrderParams, void*);

}  // namespace fastgen::attention
