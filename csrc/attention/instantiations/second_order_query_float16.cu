#include "attention/launch.cuh"

namespace fastgen::attention {

template void launch_second_order_query<Half>(SecondOrderParams, void*);

}  // namespace fastgen::attention
