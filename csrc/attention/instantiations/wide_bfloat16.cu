#include "attention/wide_launch.cuh"

namespace fastgen::attention {

template void launch_forward_wide<BFloat16>(ForwardParams, void*);
template int64_t wide_forward_workspace<BFloat16>(const Problem&);
template void launch_backward_query_wide<BFloat16>(BackwardParams, void*);
template void launch_backward_key_value_wide<BFloat16>(BackwardParams, void*);

}  // namespace fastgen::attention
