#include "attention/decode_launch.cuh"

namespace fastgen::attention {

template void launch_decode<Half>(ForwardParams, void*);
template int64_t decode_workspace<Half>(const Problem&);

}  // namespace fastgen::attention
