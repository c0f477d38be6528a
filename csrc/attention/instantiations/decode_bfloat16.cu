#include "attention/decode_launch.cuh"

namespace fastgen::attention {

template void launch_decode<BFloat16>(ForwardParams, void*);
template int64_t decode_workspace<BFloat16>(const Problem&);

}  // namespace fastgen::attention
