// The CUDA versions that decide whether the kernels can run: of the runtime that this library was linked with, and of
// the driver.
#include <cuda_runtime_api.h>

#include "common/exported.h"

// Both as CUDA numbers them, 13000 for 13.0; driver 0: there is none. Returns a cudaError_t. Creates no context.
FASTGEN_EXPORTED int fastgen_cuda_versions(int* runtime, int* driver) {
  const cudaError_t error = cudaRuntimeGetVersion(runtime);
  return static_cast<int>(error != cudaSuccess ? error : cudaDriverGetVersion(driver));
}
