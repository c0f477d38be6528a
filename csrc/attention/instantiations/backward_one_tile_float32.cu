#include "attention/one_tile_launch.cuh"

namespace fastgen::attention {

template bool launch_one_tile<float>(const BackwardParams&, void*);

}  // namespace fastgen::attention
