#include "latent/launch.cuh"

namespace fastgen::latent {

template Plan forward<Half>(const ForwardParams&, cudaStream_t);
template void backward<Half>(const BackwardParams&, cudaStream_t);

}  // namespace fastgen::latent
