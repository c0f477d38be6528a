#include "projection/launch.cuh"

namespace fastgen::projection {

template void project<BFloat16>(ProjectParams, cudaStream_t);
template void weight_gradient<BFloat16>(WeightGradientParams, cudaStream_t);
template void reduce<BFloat16>(const ReduceParams&, cudaStream_t);
template void heads_backward<BFloat16>(const HeadBackwardParams&, cudaStream_t);
template void scale_rows<BFloat16>(const void*, int64_t, const Vector&, void*, int, int, cudaStream_t);
template void sum_rows<BFloat16>(const float*, int, int, void*, cudaStream_t);

}  // namespace fastgen::projection
