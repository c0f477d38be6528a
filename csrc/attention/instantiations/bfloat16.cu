#include "attention/launch.cuh"

namespace fastgen::attention {

template void launch_forward<BFloat16>(ForwardParams, void*);
template void launch_backward<BFloat16>(const BackwardParams&, void*);
template void launch_mask_gradient<BFloat16>(const BackwardParams&, const MaskGradient&, void*);
template int mask_splits<BFloat16>(const Problem&, const int (&)[4]);

}  // namespace fastgen::attention
