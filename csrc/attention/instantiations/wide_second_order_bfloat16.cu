#include "attention/wide_second_order_launch.cuh"

namespace fastgen::attention {

template void launch_tangent_wide<BFloat16>(TangentParams, void*);
template void launch_second_order_query_wide<BFloat16>(SecondOrderParams, void*);
template void launch_second_order_key_value_wide<BFloat16>(SecondOrderParams, void*);
template void launch_mask_second_order_wide<BFloat16>(SecondOrderParams, const MaskGradient&, void*);

}  // namespace fastgen::attention
