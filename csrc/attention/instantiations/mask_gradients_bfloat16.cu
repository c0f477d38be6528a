#include "attention/launch.cuh"

namespace fastgen::attention {

template void launch_mask_gradient<BFloat16>(const BackwardParams&, const MaskGradient&, void*);
template int mask_splits<BFloat16>(const Problem&, const int (&)[4]);
template void launch_mask_second_order<BFloat16>(const SecondOrderParams&, const MaskGradient&, void*);
template int mask_second_order_splits<BFloat16>(const Problem&, const int (&)[4]);

}  // namespace fastgen::attention
