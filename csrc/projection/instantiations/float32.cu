#include "projection/launch.cuh"

namespace fastgen::projection {

template void project<float>(ProjectParams, cudaStream_t);
template void weight_gradient<float>(WeightGradientParams, cudaStream_t);
template void reduce<float>(const ReduceParams&, cudaStream_t);
template void heads_backward<float>(const HeadBackwardParams&, cudaStream_t);
template void scale_rows<float>(const void*, int64_t, const Vector&, void*, int, int, cudaStream_t);
template void sum_rows<float>(const float*, int, int, void*, cudaStream_t);

}  // namespace fastgen::projection
