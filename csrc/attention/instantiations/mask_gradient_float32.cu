#include "attention/launch.cuh"

namespace fastgen::attention {

template void launch_mask_gradient<float>(const BackwardParams&, const MaskGradient&, void*);
template int mask_splits<float>(const Problem&, const int (&)[4]);

}  // namespace fastgen::attention
