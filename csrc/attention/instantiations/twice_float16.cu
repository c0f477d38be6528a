#include "attention/launch_twice.cuh"

namespace fastgen::attention {

template void tangent<Half>(const TangentParams&, cudaStream_t);
template void second_order<Half>(const SecondOrderParams&, cudaStream_t);
template void mask_second_order<Half>(const SecondOrderParams&, const MaskGradient&, cudaStream_t);

}  // namespace fastgen::attention
