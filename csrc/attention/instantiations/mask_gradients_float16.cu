#include "attention/launch.cuh"

namespace fastgen::attention {

template void launch_mask_gradient<Half>(const BackwardParams&, const MaskGradient&, void*);
template int mask_splits<Half>(const Problem&, const int (&)[4]);
template void launch_mask_second_order<Half>(const SecondOrderParams&, const MaskGradient&, void*);
template int mask_second_order_splits<Half>(const Problem&, const int (&)[4]);

}  // namespace fastgen::attention
