#include "attention/wide_launch.cuh"

namespace fastgen::attention {

template void launch_forward_wide<Half>(ForwardParams, void*);
template int64_t wide_forward_workspace<Half>(const Problem&);
template void launch_backward_query_wide<Half>(BackwardParams, void*);
template void launch_backward_key_value_wide<Half>(BackwardParams, void*);

}  // namespace fastgen::attention
