#include "attention/launch.cuh"

namespace fastgen::attention {

template void launch_second_order_query<BFloat16>(SecondOrderParams, void*);

}  // namespace fastgen::attention
