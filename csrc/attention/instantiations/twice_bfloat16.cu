#include "attention/launch_twice.cuh"

namespace fastgen::attention {

template void tangent<BFloat16>(const TangentParams&, cudaStream_t);
template void second_order<BFloat16>(const SecondOrderParams&, cudaStream_t);
template void mask_second_order<BFloat16>(const SecondOrderParams&, const MaskGradient&, cudaStream_t);

}  // namespace fastgen::attention
