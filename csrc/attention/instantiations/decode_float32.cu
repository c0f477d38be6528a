#include "attention/decode_launch.cuh"

namespace fastgen::attention {

template void launch_decode<float>(ForwardParams, void*);
template int64_t decode_workspace<float>(const Problem&);

}  // namespace fastgen::attention
