#include "attention/one_tile_launch.cuh"

namespace fastgen::attention {

template bool launch_one_tile<BFloat16>(const BackwardParams&, void*);

}  // namespace fastgen::attention
