#include "attention/one_tile_launch.cuh"

namespace fastgen::attention {

template bool launch_one_tile<BFloat16>(const BackwardParams&, void*);
template void launch_one_tile_mask<BFloat16>(const BackwardParams&, const MaskGradient&, void*);
template int one_tile_splits<BFloat16>(const Problem&, const int (&)[4]);

}  // namespace fastgen::attention
