#include "attention/launch.cuh"

namespace fastgen::attention {

template void forward<BFloat16>(ForwardParams, cudaStream_t);
template void backward<BFloat16>(const BackwardParams&, cudaStream_t);
template void mask_gradient<BFloat16>(const BackwardParams&, const MaskGradient&, cudaStream_t);

}  // namespace fastgen::attention
