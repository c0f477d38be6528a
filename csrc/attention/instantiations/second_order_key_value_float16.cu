#include "attention/launch.cuh"

namespace fastgen::attention {

template void launch_second_order_key_value<Half>(SecondOrderParams, void*);

}  // namespace fastgen::attention
