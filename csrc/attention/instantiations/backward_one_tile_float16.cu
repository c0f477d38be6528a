#include "attention/one_tile_launch.cuh"

namespace fastgen::attention {

template bool launch_one_tile<Half>(const BackwardParams&, void*);
template void launch_one_tile_mask<Half>(const BackwardParams&, const MaskGradient&, void*);
template int one_tile_splits<Half>(const Problem&, const int (&)[4]);

}  // namespace fastgen::attention
