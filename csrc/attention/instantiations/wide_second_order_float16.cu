#include "attention/wide_second_order_launch.cuh"

namespace fastgen::attention {

template void launch_tangent_wide<Half>(TangentParams, void*);
template void launch_second_order_query_wide<Half>(SecondOrderParams, void*);
template void launch_second_order_key_value_wide<Half>(SecondOrderParams, void*);
template void launch_mask_second_order_wide<Half>(SecondOrderParams, const MaskGradient&, void*);

}  // namespace fastgen::attention
