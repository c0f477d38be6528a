#include "attention/launch_twice.cuh"

namespace fastgen::attention {

template void tangent<float>(const TangentParams&, cudaStream_t);
template void second_order<float>(const SecondOrderParams&, cudaStream_t);
template void mask_second_order<float>(const SecondOrderParams&, const MaskGradient&, cudaStream_t);

}  // namespace fastgen::attention
