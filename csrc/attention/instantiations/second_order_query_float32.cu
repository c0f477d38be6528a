#include "attention/launch.cuh"

namespace fastgen::attention {

template void launch_second_order_query<float>(SecondOrderParams, void*);

}  // namespace fastgen::attention
