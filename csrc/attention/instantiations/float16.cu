#include "attention/launch.cuh"

namespace fastgen::attention {

template void forward<Half>(ForwardParams, cudaStream_t);
template void backward<Half>(const BackwardParams&, cudaStream_t);
template void mask_gradient<Half>(const BackwardParams&, const MaskGradient&, cudaStream_t);

}  // namespace fastgen::attention
