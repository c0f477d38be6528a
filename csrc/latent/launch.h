// The interface between api.cpp and a backend: latent/launch.cu on CUDA, latent/cpu/launch.cpp on the CPU.
#pragma once

#include "latent/params.h"

namespace fastgen::latent {

// Multiprocessors of the current device; 1 on the CPU.
int multiprocessors();

// ``stream`` is a cudaStream_t, ignored on the CPU. Launchers do not synchronize.
void launch_forward(const ForwardParams& params, DType dtype, void* stream);
void launch_backward(const BackwardParams& params, DType dtype, void* stream);

}  // namespace fastgen::latent
