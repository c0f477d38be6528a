// The seam between api.cpp and a backend: latent/launch.cu on CUDA, cpu/latent.cpp on the host.
#pragma once

#include "latent/params.h"

namespace fastgen::latent {

// Multiprocessors of the current device; 1 on the host.
int multiprocessors();

// ``stream`` is a cudaStream_t, ignored on the host. Neither call synchronises.
void launch_forward(const ForwardParams& params, DType dtype, void* stream);
void launch_backward(const BackwardParams& params, DType dtype, void* stream);

}  // namespace fastgen::latent
