#include "attention/launch.cuh"

namespace fastgen::attention {

template void forward<float>(ForwardParams, cudaStream_t);
template void backward<float>(const BackwardParams&, cudaStream_t);
template void mask_gradient<float>(const BackwardParams&, const MaskGradient&, cudaStream_t);

}  // namespace fastgen::attention
