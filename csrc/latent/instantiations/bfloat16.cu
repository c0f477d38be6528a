#include "latent/launch.cuh"

namespace fastgen::latent {

template Plan forward<BFloat16>(const ForwardParams&, cudaStream_t);
template void backward<BFloat16>(const BackwardParams&, cudaStream_t);

}  // namespace fastgen::latent
