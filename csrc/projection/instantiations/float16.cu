#include "projection/launch.cuh"

namespace fastgen::projection {

template void project<Half>(ProjectParams, cudaStream_t);
template void weight_gradient<Half>(WeightGradientParams, cudaStream_t);
template void reduce<Half>(const ReduceParams&, cudaStream_t);
template void heads_backward<Half>(const HeadBackwardParams&, cudaStream_t);
template void scale_rows<Half>(const void*, int64_t, const Vector&, void*, int, int, cudaStream_t);
template void sum_rows<Half>(const float*, int, int, void*, cudaStream_t);

}  // namespace fastgen::projection
