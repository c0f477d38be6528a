#include "latent/launch.cuh"

namespace fastgen::latent {

template Plan forward<float>(const ForwardParams&, cudaStream_t);
template void backward<float>(const BackwardParams&, cudaStream_t);

}  // namespace fastgen::latent
